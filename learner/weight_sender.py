"""The sending end of a weight sync through Ray's object store.

The verbs are vLLM's own, called on the rollout actors: `start_weight_update()`, `update_weights(update_info)` once per
bucket, `finish_weight_update(policy_version)`. All ranks take part in gathering a bucket; rank 0 alone talks.
"""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from cluster.actors import call_all, get
from cluster.checksum import checksum, new_digest
from cluster.contracts.errors import WeightSyncError
from cluster.contracts.weights import TensorSpec, WeightSyncReport, plan_buckets
from learner.engine import TrainEngine


class WeightSender(Protocol):
    """Brings the engine's current weights to every rollout worker."""

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send everything and return when every worker runs on it; all ranks call this together."""


class ObjectStoreSender:
    """Sends Arrow buffers that receivers on the same node map without a copy.

    Args:
        engine: holds the weights.
        dtype: what travels; the rollout engines' own.
        bucket_bytes: the largest buffer, and the memory that a gather may take under ZeRO-3.
        timeout_seconds: for each answer of the workers.
    """

    def __init__(self, engine: TrainEngine, dtype: str, bucket_bytes: int, timeout_seconds: float) -> None:
        self._engine = engine
        self._manifest = engine.student.manifest(dtype)
        self._bucket_bytes = bucket_bytes
        self._timeout_seconds = timeout_seconds

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send everything and return when every worker runs on it; all ranks call this together.

        Raises:
            WeightSyncError: a worker received other bytes than were sent.
        """
        started = time.perf_counter()
        digest = new_digest()
        self._call(workers, "start_weight_update")
        receiving: list[Any] = []
        for bucket in plan_buckets(self._manifest.tensors, self._bucket_bytes):
            # One bucket at a time: gathering the whole model under ZeRO-3 needs a second full copy on every rank.
            with self._engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
                if self._engine.rank != 0:
                    continue
                payload = pack(bucket, parameters)
            digest.update(payload)
            # The workers read one bucket while the next is gathered and packed.
            get(receiving, self._timeout_seconds, "rollout workers to receive a bucket of weights")
            update_info = describe_bucket(bucket, payload)
            receiving = [worker.update_weights.remote(update_info) for worker in workers]
        get(receiving, self._timeout_seconds, "rollout workers to receive the last bucket of weights")
        received = self._call(workers, "finish_weight_update", policy_version)
        if self._engine.rank == 0:
            check_received(received, digest.hexdigest(), policy_version)
        seconds = time.perf_counter() - started
        return WeightSyncReport(policy_version, digest.hexdigest(), self._manifest.num_bytes, seconds)

    def _call(self, workers: Sequence[ActorHandle], verb: str, *args: Any) -> list[Any]:
        if self._engine.rank != 0:
            return []
        waiting_for = f"rollout workers to answer {verb}"
        return call_all(workers, verb, *args, timeout_seconds=self._timeout_seconds, waiting_for=waiting_for)


def pack(bucket: Sequence[TensorSpec], parameters: dict[str, Tensor]) -> pa.Buffer:
    """Copy the bucket's parameters, cast to its dtype, one after the other into one buffer."""
    payload = np.empty(sum(tensor.num_bytes for tensor in bucket), dtype=np.uint8)
    flat = torch.from_numpy(payload)
    start = 0
    for tensor in bucket:
        end = start + tensor.num_bytes
        place = flat[start:end].view(getattr(torch, tensor.dtype)).view(tensor.shape)
        place.copy_(parameters[tensor.name])
        start = end
    return pa.py_buffer(payload)


def describe_bucket(bucket: Sequence[TensorSpec], payload: pa.Buffer) -> dict[str, Any]:
    """Put the buffer into the object store and return what a worker needs to read it."""
    return {
        "names": [tensor.name for tensor in bucket],
        "dtypes": [tensor.dtype for tensor in bucket],
        "shapes": [list(tensor.shape) for tensor in bucket],
        "checksum": checksum([payload]),
        # In a list, Ray hands the worker the reference; bare, it would resolve it before the call.
        "reference": [ray.put(payload)],
    }


def check_received(received: Sequence[str], sent: str, policy_version: int) -> None:
    """Compare the workers' checksums with the sender's.

    Raises:
        WeightSyncError: they differ; names the first such worker.
    """
    for position, digest in enumerate(received):
        if digest != sent:
            raise WeightSyncError(
                f"rollout worker {position}: policy version {policy_version} was sent with checksum {sent} and arrived "
                f"with {digest}; the worker must not be used"
            )
