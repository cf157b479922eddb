"""Sends weights from GPU to GPU, to vLLM's `nccl` and `ipc` engines.

The weights are gathered, cast and sent bucket by bucket through one buffer, which is all the memory that it takes.
vLLM's engines compare no checksum, so the report's is empty. It has not run on a GPU yet (docs/gpu.md).
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from cluster.config.run_config import Config
from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.manifest import Bucket, WeightSyncReport, plan_buckets, total_bytes
from learner.engines.base import TrainEngine
from learner.rendezvous import free_port
from learner.weight_sync.gpu_links import IpcLink, Link, NcclLink, gather_from_ranks
from learner.weight_sync.gpu_update import GpuUpdate
from learner.weight_sync.object_store import NewcomerUpdate, WeightSender, fill
from learner.weight_sync.recipients import Recipients


class VllmSender:
    """Sends all weights through one buffer on the GPU; the connection opens with the first publication.

    A tensor that is larger than `config` says makes the buffer larger; what travels is of `dtype`, the rollout engines'
    own. All ranks call `make_link` together, and `agree`, which returns every rank's value; with `engines_sleep`,
    others take memory of this GPU again when they wake; `end_process` ends this one for good.
    """

    def __init__(
        self,
        engine: TrainEngine,
        config: WeightSyncConfig,
        dtype: str,
        timeout_seconds: float,
        make_link: Callable[[Tensor], Link],
        listen: Callable[[Sequence[ActorHandle], float], Recipients] = Recipients,
        bring: Callable[[Sequence[ActorHandle], int, float], NewcomerUpdate] = NewcomerUpdate,
        end_process: Callable[[int], Any] = os._exit,
        engines_sleep: bool = False,
        agree: Callable[[bool], list[bool]] = gather_from_ranks,
    ) -> None:
        self._engine, self._make_link, self._end_process = engine, make_link, end_process
        self._agree = agree
        self._listen, self._bring = listen, bring
        self._timeout_seconds, self._engines_sleep = timeout_seconds, engines_sleep
        self._buckets = list(plan_buckets(engine.student.manifest(dtype), config.bucket_bytes))
        self._link: Link | None = None
        self._buffer: Tensor
        self._connected: list[ActorHandle] = []
        self._known: list[ActorHandle] = []  # those that have had weights from here
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gpu-link")  # of what may wait for ever

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        started = time.perf_counter()
        if self._link is None:
            # Here and not before: the GPU has the least memory left while the engines start.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._buffer = torch.empty(max(map(total_bytes, self._buckets)), dtype=torch.uint8, device=device)
            self._link = self._make_link(self._buffer)
        if self._engines_sleep:
            torch.cuda.empty_cache()  # what training left there, and will take again; nothing without a GPU
        is_first = self._engine.rank == 0
        update, newcomers = self._begin(self._link, workers, policy_version) if is_first else (None, None)
        self._send_all(self._link, update, newcomers)
        while self._is_broken(self._link, update):
            if update is not None:
                update = self._begin_anew(self._link, update)
            self._send_all(self._link, update)
        paused_seconds = update.finish(policy_version) if update is not None else None
        if newcomers is not None:
            newcomers.finish()
        num_bytes = sum(map(total_bytes, self._buckets))
        return WeightSyncReport(policy_version, "", num_bytes, time.perf_counter() - started, paused_seconds)

    def _send_all(self, link: Link, update: GpuUpdate | None, newcomers: NewcomerUpdate | None = None) -> None:
        """Gather every bucket with the other ranks, and send it, from rank 0, as long as the group holds."""
        for bucket in self._buckets:
            self._fill(link, bucket)
            link.settle()
            values = self._buffer[: total_bytes(bucket)]
            if update is not None:
                update.send(bucket, values)
            if newcomers is not None:
                newcomers.send(bucket, values)
            if link.is_read_in_place:
                link.settle()
        if update is not None:
            update.settle()

    def _is_broken(self, link: Link, update: GpuUpdate | None) -> bool:
        """Return, on all ranks alike, whether the group broke, so that those that live need all buckets again."""
        return not link.is_read_in_place and any(self._agree(update is not None and update.is_broken))

    def _fill(self, link: Link, bucket: Bucket) -> None:
        """Gather one bucket, with the other ranks, and leave it in the buffer if this rank's is read."""
        # One bucket at a time: gathering the whole model under ZeRO-3 needs a second full copy on every rank.
        with self._engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
            if link.fills_buffer:
                fill(bucket, parameters, self._buffer)

    def _begin(
        self, link: Link, workers: Sequence[ActorHandle], policy_version: int
    ) -> tuple[GpuUpdate, NewcomerUpdate | None]:
        """Pause the workers and see that they are connected, but for those that come while others are."""
        come_later = not link.is_read_in_place and bool(self._connected)
        new = [worker for worker in workers if come_later and worker not in self._known]
        members = [worker for worker in workers if worker not in new]
        update = self._make_update(link, members)
        living = self._connect(update)
        self._known = [*(living or self._known), *new]
        return update, self._bring(new, policy_version, self._timeout_seconds) if new else None

    def _begin_anew(self, link: Link, broken: GpuUpdate) -> GpuUpdate:
        """Begin an update of the workers that live, in another group."""
        self._connected = []
        update = self._make_update(link, broken.living())
        update.paused = broken.paused
        self._connect(update)
        return update

    def _make_update(self, link: Link, workers: Sequence[ActorHandle]) -> GpuUpdate:
        recipients = self._listen(workers, self._timeout_seconds)
        return GpuUpdate(link, recipients, self._thread, self._end_process, self._timeout_seconds)

    def _connect(self, update: GpuUpdate) -> list[ActorHandle]:
        """Pause the workers, and return those that live, which are in one group."""
        living = update.start()
        while living and living != self._connected:
            # A group spans a fixed set of workers; another set needs another, as when one of them dies meanwhile.
            self._connected = []
            if update.connect():
                self._connected = living
            living = update.living()
        return living


def make_nccl_sender(engine: TrainEngine, config: Config) -> WeightSender:
    """Build the sender of a run whose workers have GPUs of their own."""
    tensor_parallel, bucket_bytes = config.rollout.engine.tensor_parallel, config.weight_sync.bucket_bytes
    return _make_sender(engine, config, nccl_link(engine, tensor_parallel, bucket_bytes))


def make_ipc_sender(engine: TrainEngine, config: Config) -> WeightSender:
    """Build the sender of a run whose workers share a GPU; raise WeightSyncError if torch's memory cannot be shared."""
    refuse_expandable_segments(os.environ)
    return _make_sender(engine, config, ipc_link, some_sleep(config))


def some_sleep(config: Config) -> bool:
    """Return whether engines beside the learner give memory back for a time: the generator's, or teachers of a slot."""
    return config.rollout.engine.sleep or any(len(names) > 1 for names in config.scorer_groups.values())


def _make_sender(
    engine: TrainEngine, config: Config, make_link: Callable[[Tensor], Link], engines_sleep: bool = False
) -> WeightSender:
    dtype, timeout_seconds = config.rollout.engine.dtype, config.ray.call_timeout_seconds
    return VllmSender(engine, config.weight_sync, dtype, timeout_seconds, make_link, engines_sleep=engines_sleep)


def nccl_link(engine: TrainEngine, tensor_parallel: int, bucket_bytes: int) -> Callable[[Tensor], Link]:
    """Return what makes an NcclLink."""

    def choose_address() -> tuple[str, int]:
        return ray.util.get_node_ip_address(), free_port()

    return lambda buffer: NcclLink(engine.rank == 0, choose_address, tensor_parallel, max(bucket_bytes, buffer.numel()))


def refuse_expandable_segments(environment: Mapping[str, str]) -> None:
    """Raise WeightSyncError where torch's allocator is asked for segments that other processes cannot open by `ipc`.

    Torch would pass them as file descriptors, which many containers forbid; elsewhere each opening takes much longer.
    """
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        settings = environment.get(name, "")
        if re.search(r"\bexpandable_segments\s*:\s*true\b", settings, re.IGNORECASE):
            raise WeightSyncError(
                f'weight_sync.transport = "ipc" shares memory between processes, and {name} = "{settings}" asks torch '
                "for memory that they cannot open; leave expandable_segments out, or set weight_sync.transport = "
                '"object_store"'
            )


def ipc_link(buffer: Tensor) -> Link:
    """Make an IpcLink; raise WeightSyncError if the buffer is not on a GPU."""
    if not buffer.is_cuda:
        raise WeightSyncError('weight_sync.transport = "ipc" shares memory of a GPU, and the learner has none')
    return IpcLink(buffer, str(torch.cuda.get_device_properties(buffer.device).uuid), gather_from_ranks)
