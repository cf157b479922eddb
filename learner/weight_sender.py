"""The sending end of a weight sync through Ray's object store.

The verbs are vLLM's own, called on the rollout actors: `start_weight_update(first)`, `update_weights(update_info)` once
per bucket, `finish_weight_update(policy_version)`. All ranks take part in gathering a bucket; rank 0 alone talks.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from ray.actor import ActorHandle
from torch import Tensor

from cluster.contracts.learner import WeightSyncConfig
from cluster.contracts.weights import WeightSyncReport, plan_buckets, total_bytes
from learner.engine import TrainEngine
from learner.weight_update import Bucket, Bytes, SentCopy, WeightUpdate


class WeightSender(Protocol):
    """Brings the engine's current weights to every rollout worker."""

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send everything and return when every worker runs on it; all ranks call this together."""


class ObjectStoreSender:
    """Sends Arrow buffers that engines on the same node map without a copy; Ray moves them to a node at most once.

    Rank 0 keeps memory for one bucket between updates (fresh memory costs several times the copying into it), and in
    delta mode a copy of the weights; every rank of a rollout engine then keeps one too.

    Args:
        engine: holds the weights.
        config: what is sent, and how large a buffer may be, which is also the memory that a gather takes under ZeRO-3.
        dtype: what travels; the rollout engines' own.
        timeout_seconds: for each answer of the workers.
    """

    def __init__(self, engine: TrainEngine, config: WeightSyncConfig, dtype: str, timeout_seconds: float) -> None:
        self._engine = engine
        self._timeout_seconds = timeout_seconds
        manifest = engine.student.manifest(dtype)
        self._buckets = list(plan_buckets(manifest.tensors, config.bucket_bytes))
        keeps_copy = config.mode == "delta" and engine.rank == 0
        self._sent = SentCopy(manifest.num_bytes) if keeps_copy else None
        largest = max(total_bytes(bucket) for bucket in self._buckets)
        # Pinned where there is a GPU: it writes into pageable memory several times slower.
        pinned = torch.cuda.is_available()
        self._memory: Bytes = torch.empty(
            largest if engine.rank == 0 else 0, dtype=torch.uint8, pin_memory=pinned
        ).numpy()

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send everything and return when every worker runs on it; all ranks call this together.

        Raises:
            WeightSyncError: a worker received other bytes than were sent.
        """
        if self._engine.rank != 0:
            return self._take_part(policy_version)
        update = WeightUpdate(workers, policy_version, self._sent, self._timeout_seconds)
        for bucket in self._buckets:
            # One bucket at a time: gathering the whole model under ZeRO-3 needs a second full copy on every rank.
            with self._engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
                payload = pack(bucket, parameters, self._memory)
            update.send(bucket, payload)
        return update.finish()

    def _take_part(self, policy_version: int) -> WeightSyncReport:
        """Gather with the other ranks; rank 0's report is the one that counts."""
        started = time.perf_counter()
        for bucket in self._buckets:
            with self._engine.full_parameters([tensor.name for tensor in bucket]):
                pass
        return WeightSyncReport(policy_version, "", 0, time.perf_counter() - started)


def pack(bucket: Bucket, parameters: dict[str, Tensor], memory: Bytes) -> Bytes:
    """Copy the bucket's parameters, cast to its dtype, one after the other into memory; return the part they fill."""
    payload = memory[: total_bytes(bucket)]
    fill(bucket, parameters, torch.from_numpy(payload))
    return payload


def fill(bucket: Bucket, parameters: dict[str, Tensor], memory: Tensor) -> None:
    """Copy the bucket's parameters, cast to its dtype, one after the other into memory of bytes, on any device."""
    start = 0
    for tensor in bucket:
        end = start + tensor.num_bytes
        place = memory[start:end].view(getattr(torch, tensor.dtype)).view(tensor.shape)
        place.copy_(parameters[tensor.name])
        start = end
