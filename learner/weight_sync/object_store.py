"""Sends weights through Ray's object store.

The verbs are vLLM's own, called on the rollout actors: `start_weight_update(first)`, `update_weights(update_info)` once
per bucket, `finish_weight_update(policy_version)`. All ranks take part in gathering a bucket; rank 0 alone talks.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from torch import Tensor

from cluster.config.run_config import Config
from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import WeightSyncError
from cluster.contracts.pieces import Pieces
from cluster.weight_sync.manifest import (
    DTYPE_BYTES,
    Bucket,
    Bytes,
    WeightSyncReport,
    checksum,
    new_digest,
    places,
    plan_buckets,
    total_bytes,
)
from cluster.weight_sync.transports import Encoded, FullPayload, Payload, make_payload
from learner.engines.base import TrainEngine
from learner.weight_sync.recipients import Recipients

# The workers read one object while the next one is put. What is put is still in the processor's cache when it is read.
MAX_OBJECT_BYTES = 64 << 20
AS_IT_IS = Encoded(np.empty(0, np.uint8))


class WeightUpdate:
    """Sends buckets to all workers: what the payload makes of them, or the values to workers that cannot decode it.

    Generation pauses when the first bucket is in the object store of the worker's node. Workers that die are passed
    over.
    """

    def __init__(
        self,
        workers: Sequence[ActorHandle],
        policy_version: int,
        payload: str,
        encoder: Payload,
        base_version: int | None,
        timeout_seconds: float,
        kind: str = "rollout",
    ) -> None:
        """Find out which workers can decode.

        Args:
            workers: the actors of a pool.
            policy_version: what they will run on.
            payload, encoder: the name of what travels, and this end of it.
            base_version: of an incremental payload, what was sent before; None: nothing, or that update failed.
            timeout_seconds: for each answer of the workers.
            kind: what errors call them.
        """
        self._started = time.perf_counter()
        self._paused: float | None = None
        self._policy_version, self._kind = policy_version, kind
        self._recipients = Recipients(workers, timeout_seconds, kind)
        self._encoder, self._base_version = encoder, base_version
        self._common = {"payload": payload, "kept_as": policy_version if encoder.is_incremental else None}
        self._can_decode = self._compare_versions()
        self._receiving: dict[int, Any] = {}  # worker -> reference
        self._digest = new_digest()
        self._num_bytes = self._num_values = 0
        self._num_changed: int | None = 0  # None: not known

    def put(self, bucket: Bucket, values: Sequence[Bytes]) -> dict[int, dict[str, Any]]:
        """Put what is needed of a bucket into the object store, encoded or as it is or both.

        Args:
            bucket: the tensors.
            values: theirs, in pieces one after the other; in one piece if the payload is any but `full`.

        Returns:
            each worker's message, which says what it reads and how.
        """
        encoded = AS_IT_IS
        if self._common["payload"] != "full":
            encoded = self._encoder.encode(bucket, values[0], self._base_version is not None)
        self._num_values += sum(tensor.num_bytes // DTYPE_BYTES[tensor.dtype] for tensor in bucket)
        if self._num_changed is not None:
            self._num_changed = None if encoded.num_changed is None else self._num_changed + encoded.num_changed
        can_decode = {position: self._can_decode[position] for position in self._recipients.workers}
        values_message: dict[str, Any] = {}
        message: dict[str, Any] = {}
        # Reading the bytes for the checksum takes half as long as copying them, so both go on at the same time.
        with ThreadPoolExecutor(max_workers=1) as thread:
            digesting = thread.submit(self._add_to_digest, values)
            if not encoded.fields or not all(can_decode.values()):
                values_message = message = self._describe(bucket, values, {})
            if encoded.fields and any(can_decode.values()):
                message = self._describe(bucket, [encoded.memory], encoded.fields)
                message |= {"base_version": self._base_version, "checksum": checksum([encoded.memory])}
        values_message["checksum"] = digesting.result()
        return {position: message if can else values_message for position, can in can_decode.items()}

    def send(self, messages: Mapping[int, dict[str, Any]]) -> None:
        """Let the workers read a bucket, which `put` described, while the next one is made."""
        if self._paused is None:
            self._start(messages)
        self._recipients.answers(self._receiving, "receive a bucket of weights")
        self._receiving = self._recipients.call("update_weights", messages)

    def finish(self) -> WeightSyncReport:
        """Wait until every worker runs on the new weights; compare their checksums."""
        self._recipients.answers(self._receiving, "receive the last bucket of weights")
        versions = dict.fromkeys(self._recipients.workers, self._policy_version)
        received = self._recipients.answers(
            self._recipients.call("finish_weight_update", versions), "answer finish_weight_update"
        )
        check_received(received, self._digest.hexdigest(), self._policy_version, self._kind)
        now = time.perf_counter()
        return WeightSyncReport(
            policy_version=self._policy_version,
            checksum=self._digest.hexdigest(),
            num_bytes=self._num_bytes,
            seconds=now - self._started,
            paused_seconds=None if self._paused is None else now - self._paused,
            changed_fraction=None if self._num_changed is None else self._num_changed / self._num_values,
        )

    def _compare_versions(self) -> dict[int, bool]:
        """Return which workers can decode: all, or those that hold what an incremental payload applies to."""
        workers = self._recipients.workers
        if not self._encoder.is_incremental or self._base_version is None:
            return dict.fromkeys(workers, not self._encoder.is_incremental)
        calls = {position: worker.held_version.remote() for position, worker in workers.items()}
        held = self._recipients.answers(calls, "say which weights they hold")
        return {position: version == self._base_version for position, version in held.items()}

    def _start(self, messages: Mapping[int, dict[str, Any]]) -> None:
        self._paused = time.perf_counter()
        first = {position: message["reference"] for position, message in messages.items()}
        self._recipients.answers(self._recipients.call("start_weight_update", first), "answer start_weight_update")

    def _describe(self, bucket: Bucket, memory: Sequence[Bytes], fields: Mapping[str, Any]) -> dict[str, Any]:
        """Put the bytes into the object store and return what a worker needs to read them."""
        pieces = Pieces(memory)
        self._num_bytes += pieces.size
        return self._common | {
            "names": [tensor.name for tensor in bucket],
            "dtypes": [tensor.dtype for tensor in bucket],
            "shapes": [list(tensor.shape) for tensor in bucket],
            "fields": dict(fields),
            # In a list, Ray hands the worker the reference; bare, it would resolve it before the call.
            "reference": [ray.put(pieces)],
        }

    def _add_to_digest(self, values: Sequence[Bytes]) -> str:
        for piece in values:
            self._digest.update(piece.data)
        return self._digest.hexdigest()


def check_received(received: Mapping[int, str], sent: str, policy_version: int, kind: str = "rollout") -> None:
    """Compare the workers' checksums with the sender's.

    Raises:
        WeightSyncError: they differ; names the first such worker.
    """
    for position, digest in received.items():
        if digest != sent:
            raise WeightSyncError(
                f"{kind} worker {position}: policy version {policy_version} was sent with checksum {sent} and arrived "
                f"with {digest}; the worker must not be used"
            )


class NewcomerUpdate:
    """Brings weights through the object store to workers that are not in the learner's NCCL group yet.

    A group spans a fixed set of workers. So a worker that comes during a run gets its first weights this way, from the
    buffer that the sender fills for everyone: the group stays as it is, and the worker joins with the next publication.
    """

    def __init__(self, workers: Sequence[ActorHandle], policy_version: int, timeout_seconds: float) -> None:
        self._update = WeightUpdate(workers, policy_version, "full", FullPayload(), None, timeout_seconds)

    def send(self, bucket: Bucket, values: Tensor) -> None:
        """Copy what lies in the buffer to host memory, in objects of the store's size, and let the workers read."""
        memory = values.cpu().numpy()  # waits for what fills the buffer
        first = 0
        for part in plan_buckets(bucket, MAX_OBJECT_BYTES):
            size = total_bytes(part)
            self._update.send(self._update.put(part, [memory[first : first + size]]))
            first += size

    def finish(self) -> WeightSyncReport:
        """Wait until every newcomer that lives runs on the weights."""
        return self._update.finish()


class WeightSender(Protocol):
    """Brings the engine's current weights to every rollout worker; the learner's end of a transport."""

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Send everything and return when every worker runs on it; all ranks call this together.

        Raises:
            WeightSyncError: the connection cannot be made, or a worker received other bytes than were sent.
        """


class ObjectStoreSender:
    """Sends Arrow buffers that engines on the same node map without a copy; Ray moves them to a node at most once.

    Rank 0 keeps memory for one bucket between updates (fresh memory costs several times the copying into it), and what
    the payload keeps; every rank of a rollout engine then keeps as much.

    Args:
        engine: holds the weights.
        config: what is sent, and how large a buffer may be, which is also the memory that a gather takes under ZeRO-3.
        dtype: what travels; the engines' own.
        timeout_seconds: for each answer of the workers.
        kind: what errors call the workers.
    """

    def __init__(
        self,
        engine: TrainEngine,
        config: WeightSyncConfig,
        dtype: str,
        timeout_seconds: float,
        kind: str = "rollout",
    ) -> None:
        self._engine, self._kind = engine, kind
        self._timeout_seconds = timeout_seconds
        self._payload = config.payload
        self._encoder = make_payload(config.payload)
        self._base_version: int | None = None  # what the encoder's next values apply to
        bucket_bytes = min(config.bucket_bytes, MAX_OBJECT_BYTES)
        self._buckets = list(plan_buckets(engine.student.manifest(dtype), bucket_bytes))
        largest = max(total_bytes(bucket) for bucket in self._buckets)
        # Pinned where there is a GPU: it writes into pageable memory several times slower.
        pinned = torch.cuda.is_available()
        self._memory: Bytes = torch.empty(
            largest if engine.rank == 0 else 0, dtype=torch.uint8, pin_memory=pinned
        ).numpy()

    def publish(self, workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        if self._engine.rank != 0:
            return self._take_part(policy_version)
        base_version, self._base_version = self._base_version, None  # until this update has succeeded
        update = WeightUpdate(
            workers, policy_version, self._payload, self._encoder, base_version, self._timeout_seconds, self._kind
        )
        for bucket in self._buckets:
            # One bucket at a time: gathering the whole model under ZeRO-3 needs a second full copy on every rank.
            with self._engine.full_parameters([tensor.name for tensor in bucket]) as parameters:
                messages = update.put(bucket, self._values(bucket, parameters))
            update.send(messages)
        report = update.finish()
        self._base_version = policy_version if self._encoder.is_incremental else None
        return report

    def _values(self, bucket: Bucket, parameters: dict[str, Tensor]) -> list[Bytes]:
        """Return the bucket's bytes, of which an encoder may need all in one place."""
        if self._payload == "full":
            return view(bucket, parameters, self._memory)
        return [pack(bucket, parameters, self._memory)]

    def _take_part(self, policy_version: int) -> WeightSyncReport:
        """Gather with the other ranks; rank 0's report is the one that counts."""
        started = time.perf_counter()
        for bucket in self._buckets:
            with self._engine.full_parameters([tensor.name for tensor in bucket]):
                pass
        return WeightSyncReport(policy_version, "", 0, time.perf_counter() - started)


def make_sender(engine: TrainEngine, config: Config) -> WeightSender:
    """Build the sender of a run."""
    dtype, timeout_seconds = config.rollout.engine.dtype, config.ray.call_timeout_seconds
    return ObjectStoreSender(engine, config.weight_sync, dtype, timeout_seconds)


def pack(bucket: Bucket, parameters: dict[str, Tensor], memory: Bytes) -> Bytes:
    """Copy the bucket's parameters, cast to its dtype, one after the other into memory; return the part they fill."""
    values = memory[: total_bytes(bucket)]
    fill(bucket, parameters, torch.from_numpy(values))
    return values


def view(bucket: Bucket, parameters: dict[str, Tensor], memory: Bytes) -> list[Bytes]:
    """Return the bytes of each parameter: its own where they can travel as they are, else packed into memory."""
    pieces = []
    for tensor, place in places(bucket):
        values = parameters[tensor.name]
        if values.dtype != getattr(torch, tensor.dtype) or not (values.is_cpu and values.is_contiguous()):
            pieces.append(pack([tensor], parameters, memory[place]))
        else:
            pieces.append(values.view(-1).view(torch.uint8).numpy())
    return pieces


def fill(bucket: Bucket, parameters: dict[str, Tensor], memory: Tensor) -> None:
    """Copy the bucket's parameters, cast to its dtype, one after the other into memory of bytes, on any device."""
    for tensor, place in places(bucket):
        values = memory[place].view(getattr(torch, tensor.dtype)).view(tensor.shape)
        values.copy_(parameters[tensor.name])
