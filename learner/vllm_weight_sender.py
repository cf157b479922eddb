"""The sending end of a weight sync over vLLM's own `nccl` and `ipc` backends, for GPUs.

vLLM's trainer side gathers, packs and broadcasts; this file gives it the engine's parameters and a way to reach the
rollout actors. It needs GPUs, and has so far been type-checked, not run. vLLM compares no checksum
here, so the report's is empty.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from cluster.actors import call_all, get
from cluster.contracts.weights import WeightManifest, WeightSyncReport
from learner.engine import TrainEngine
from learner.rendezvous import free_port


class VllmSender:
    """Drives vLLM's trainer-side engine; the connection opens with the first publication.

    Args:
        engine: holds the weights.
        backend: vLLM's name of the transport.
        dtype: what travels; the rollout engines' own.
        tensor_parallel: GPUs of each rollout worker.
        timeout_seconds: for each answer of the workers.
    """

    def __init__(
        self,
        engine: TrainEngine,
        backend: Literal["nccl", "ipc"],
        dtype: str,
        tensor_parallel: int,
        timeout_seconds: float,
    ) -> None:
        self._engine = engine
        self._backend = backend
        self._source = EngineSource(engine, engine.student.manifest(dtype))
        self._tensor_parallel = tensor_parallel
        self._timeout_seconds = timeout_seconds
        self._transfers: dict[tuple[Any, ...], TrainerWeightTransferEngine[Any]] = {}

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send everything and return when every worker runs on it; all ranks call this together."""
        started = time.perf_counter()
        key = tuple(worker._actor_id for worker in workers)
        if key not in self._transfers:
            # A communicator spans a fixed set of workers; another set needs another.
            self._transfers = {key: self._connect(workers)}
        transfer = self._transfers[key]
        transfer.client.policy_version = policy_version
        transfer.send_weights()
        seconds = time.perf_counter() - started
        return WeightSyncReport(policy_version, "", self._source.manifest.num_bytes, seconds)

    def _connect(self, workers: Sequence[ActorHandle]) -> TrainerWeightTransferEngine[Any]:
        client = RolloutClient(workers, self._tensor_parallel, self._timeout_seconds)
        init_info: TrainerInitInfo
        if self._backend == "ipc":
            init_info = IPCTrainerInitInfo(rank=self._engine.rank)
        else:
            init_info = NCCLTrainerInitInfo(
                master_address=ray.util.get_node_ip_address(),
                master_port=free_port(),
                world_size=1 + len(workers) * self._tensor_parallel,
                rank=self._engine.rank,
            )
        return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=self._source)


class EngineSource(WeightSource):
    """The engine's parameters as vLLM reads them, one gathered at a time."""

    def __init__(self, engine: TrainEngine, manifest: WeightManifest) -> None:
        self._engine = engine
        self.manifest = manifest

    def metadata(self) -> list[ParamMeta]:
        """Describe every parameter in the order of iteration."""
        return [ParamMeta(spec.name, getattr(torch, spec.dtype), spec.shape) for spec in self.manifest.tensors]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter whole; all ranks iterate together."""
        for spec in self.manifest.tensors:
            with self._engine.full_parameters([spec.name]) as parameters:
                # A copy: vLLM packs several parameters into one message after this one's gather has ended.
                yield spec.name, parameters[spec.name].to(getattr(torch, spec.dtype), copy=True)


class RolloutClient:
    """vLLM's control verbs, fanned out to the rollout actors."""

    def __init__(self, workers: Sequence[ActorHandle], tensor_parallel: int, timeout_seconds: float) -> None:
        self.policy_version = 0
        self._workers = workers
        self._tensor_parallel = tensor_parallel
        self._timeout_seconds = timeout_seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open every receiving end; each worker's GPUs follow those of the worker before in the NCCL group."""
        references = []
        for position, worker in enumerate(self._workers):
            offset = {"rank_offset": 1 + position * self._tensor_parallel} if "rank_offset" in init_info else {}
            references.append(worker.init_weight_transfer.remote({**init_info, **offset}))
        get(references, self._timeout_seconds, "rollout workers to open the weight transfer")

    def start_weight_update(self) -> None:
        """Pause the workers."""
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Let the workers receive."""
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Resume the workers on the new weights."""
        self._call("finish_weight_update", self.policy_version)

    def _call(self, verb: str, *args: Any) -> None:
        waiting_for = f"rollout workers to answer {verb}"
        call_all(self._workers, verb, *args, timeout_seconds=self._timeout_seconds, waiting_for=waiting_for)
