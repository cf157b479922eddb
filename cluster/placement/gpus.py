"""Reads how much memory GPUs have, without a CUDA context on them."""

import os
from collections.abc import Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.contracts.errors import PlacementError

GIB = 1 << 30
READ_SECONDS = 120.0  # the longest that a node's answer may take
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
NO_GPU = ("", "-1", "NoDevFiles")


def visible_gpus() -> list[float]:
    """Return the GiB of each GPU of this machine that CUDA_VISIBLE_DEVICES shows; none where NVML finds none."""
    import ray._private.thirdparty.pynvml as nvml  # the one that Ray counts GPUs with

    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return []
    try:
        shown = os.environ.get(VISIBLE_GPUS)
        names = map(str, range(nvml.nvmlDeviceGetCount())) if shown is None else shown.split(",")
        return [nvml.nvmlDeviceGetMemoryInfo(_handle(nvml, name)).total / GIB for name in names if name not in NO_GPU]
    except nvml.NVMLError as error:
        raise PlacementError(
            f"{VISIBLE_GPUS}={os.environ.get(VISIBLE_GPUS, '')}: NVML cannot say how much memory a GPU has: {error}"
        ) from error
    finally:
        nvml.nvmlShutdown()


def smallest_gpu(node_ids: Sequence[str]) -> float | None:
    """Ask these nodes of the connected cluster for their GPUs; return the GiB of the smallest, None without any."""
    if not node_ids:
        return None
    read = ray.remote(num_cpus=0, max_calls=1)(visible_gpus)
    answers = [
        read.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote()
        for node_id in node_ids
    ]
    try:
        return min((gib for gpus in ray.get(answers, timeout=READ_SECONDS) for gib in gpus), default=None)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise PlacementError(f"a node does not say how much memory its GPUs have: {error}") from error


def _handle(nvml: object, name: str) -> object:
    """Return NVML's handle of a GPU by its number or, of a part of one too, by its UUID."""
    by_uuid, by_number = nvml.nvmlDeviceGetHandleByUUID, nvml.nvmlDeviceGetHandleByIndex  # type: ignore[attr-defined]
    return by_number(int(name)) if name.isdigit() else by_uuid(name)
