"""The sending end of a weight sync through Ray's object store.

The verbs are vLLM's own, called on the rollout actors: `start_weight_update(first)`, `update_weights(update_info)` once
per bucket, `finish_weight_update(policy_version)`. All ranks take part in gathering a bucket; rank 0 alone talks.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from torch import Tensor

from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.delta import ALIGNMENT, BITS, Delta, encode
from cluster.weight_sync.manifest import (
    DTYPE_BYTES,
    TensorSpec,
    WeightSyncReport,
    checksum,
    new_digest,
    plan_buckets,
    total_bytes,
)
from learner.engines.base import TrainEngine
from learner.weight_sync.recipients import Recipients

Bucket = Sequence[TensorSpec]
Bytes = NDArray[np.uint8]


class SentCopy:
    """The parameters as they were last sent, in manifest order; the next ones are compared with them.

    It takes as much of rank 0's host memory as the weights in the dtype that travels.
    """

    def __init__(self, num_bytes: int) -> None:
        self.version: int | None = None  # None: nothing was sent yet, or the last update failed
        self.memory: Bytes = np.empty(num_bytes, np.uint8)


class WeightUpdate:
    """Sends buckets to all workers: what changed to those that hold what was sent last, whole parameters to the others.

    Generation pauses when the first bucket is in the object store of the worker's node. Workers that die are passed
    over.
    """

    def __init__(
        self, workers: Sequence[ActorHandle], policy_version: int, sent: SentCopy | None, timeout_seconds: float
    ) -> None:
        """Find out which workers can take changes.

        Args:
            workers: the rollout actors.
            policy_version: what they will run on.
            sent: what was sent last, brought up to date on the way; None: send whole parameters and keep none.
            timeout_seconds: for each answer of the workers.
        """
        self._started = time.perf_counter()
        self._paused: float | None = None
        self._policy_version = policy_version
        self._recipients = Recipients(workers, timeout_seconds)
        self._sent = sent
        self._base_version = sent.version if sent else None
        if sent:
            sent.version = None  # until this update has succeeded
        self._takes_changes = self._compare_versions()
        self._receiving: dict[int, Any] = {}  # worker -> reference
        self._digest = new_digest()
        self._num_bytes = self._num_values = self._num_changed = self._position = 0

    def send(self, bucket: Bucket, payload: Bytes) -> None:
        """Put a bucket into the object store and let the workers read it while the next one is made."""
        self._digest.update(payload.data)
        messages = self._put(bucket, payload)
        if self._paused is None:
            self._start(messages)
        self._recipients.answers(self._receiving, "receive a bucket of weights")
        self._receiving = self._recipients.call("update_weights", messages)

    def finish(self) -> WeightSyncReport:
        """Wait until every worker runs on the new weights.

        Raises:
            WeightSyncError: a worker received other bytes than were sent.
        """
        self._recipients.answers(self._receiving, "receive the last bucket of weights")
        versions = dict.fromkeys(self._recipients.workers, self._policy_version)
        received = self._recipients.answers(
            self._recipients.call("finish_weight_update", versions), "answer finish_weight_update"
        )
        check_received(received, self._digest.hexdigest(), self._policy_version)
        if self._sent:
            self._sent.version = self._policy_version
        now = time.perf_counter()
        return WeightSyncReport(
            policy_version=self._policy_version,
            checksum=self._digest.hexdigest(),
            num_bytes=self._num_bytes,
            seconds=now - self._started,
            paused_seconds=None if self._paused is None else now - self._paused,
            changed_fraction=None if self._base_version is None else self._num_changed / self._num_values,
        )

    def _compare_versions(self) -> dict[int, bool]:
        """Return which workers hold what the changes apply to."""
        if self._base_version is None:
            return dict.fromkeys(self._recipients.workers, False)
        asked = {position: worker.held_version.remote() for position, worker in self._recipients.workers.items()}
        held = self._recipients.answers(asked, "say which weights they hold")
        return {position: version == self._base_version for position, version in held.items()}

    def _start(self, messages: Mapping[int, dict[str, Any]]) -> None:
        self._paused = time.perf_counter()
        first = {position: message["reference"] for position, message in messages.items()}
        self._recipients.answers(self._recipients.call("start_weight_update", first), "answer start_weight_update")

    def _put(self, bucket: Bucket, payload: Bytes) -> dict[int, dict[str, Any]]:
        """Put what is needed of a bucket, changes or all of it or both, and return each worker's message."""
        delta = self._compare(bucket, payload)
        takes_changes = {position: self._takes_changes[position] for position in self._recipients.workers}
        whole: dict[str, Any] = {}
        changes: dict[str, Any] = {}
        if not all(takes_changes.values()):
            whole = self._describe(bucket, payload, self._digest.hexdigest())
        if any(takes_changes.values()):
            joined = join(delta)
            changes = self._describe(bucket, joined, checksum([joined])) | {
                "encodings": [part.encoding for part in delta],
                "num_values": [len(part.values) for part in delta],
                "base_version": self._base_version,
            }
        return {position: changes if takes else whole for position, takes in takes_changes.items()}

    def _compare(self, bucket: Bucket, payload: Bytes) -> list[Delta]:
        """Return what changed since the last update, if there was one, and remember the new values."""
        if self._sent is None:
            return []
        last = self._sent.memory[self._position : self._position + len(payload)]
        self._position += len(payload)
        delta = [] if self._base_version is None else compare(bucket, last, payload)
        self._num_values += sum(tensor.num_bytes // DTYPE_BYTES[tensor.dtype] for tensor in bucket)
        self._num_changed += sum(part.num_changed for part in delta)
        last[:] = payload
        return delta

    def _describe(self, bucket: Bucket, payload: Bytes, digest: str) -> dict[str, Any]:
        self._num_bytes += len(payload)
        return describe_bucket(bucket, payload, digest) | ({"kept_as": self._policy_version} if self._sent else {})


def compare(bucket: Bucket, old: Bytes, new: Bytes) -> list[Delta]:
    """Return what changed in each parameter of a bucket."""
    deltas = []
    start = 0
    for tensor in bucket:
        place = slice(start, start + tensor.num_bytes)
        deltas.append(encode(old[place].view(BITS[tensor.dtype]), new[place].view(BITS[tensor.dtype])))
        start += tensor.num_bytes
    return deltas


def join(deltas: Sequence[Delta]) -> Bytes:
    """Return the bytes of all parts, one after the other."""
    joined = np.concatenate([delta.to_bytes() for delta in deltas])
    return joined if joined.size else np.zeros(ALIGNMENT, np.uint8)  # nothing cannot be mapped


def describe_bucket(bucket: Bucket, payload: Bytes, digest: str) -> dict[str, Any]:
    """Put the bytes into the object store and return what a worker needs to read and check them."""
    return {
        "names": [tensor.name for tensor in bucket],
        "dtypes": [tensor.dtype for tensor in bucket],
        "shapes": [list(tensor.shape) for tensor in bucket],
        "checksum": digest,
        # In a list, Ray hands the worker the reference; bare, it would resolve it before the call.
        "reference": [ray.put(pa.py_buffer(payload))],
    }


def check_received(received: Mapping[int, str], sent: str, policy_version: int) -> None:
    """Compare the workers' checksums with the sender's.

    Raises:
        WeightSyncError: they differ; names the first such worker.
    """
    for position, digest in received.items():
        if digest != sent:
            raise WeightSyncError(
                f"rollout worker {position}: policy version {policy_version} was sent with checksum {sent} and arrived "
                f"with {digest}; the worker must not be used"
            )


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
