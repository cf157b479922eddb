"""Brings weights through the object store to rollout workers that are not in the learner's NCCL group yet.

A group spans a fixed set of workers: each that forms it waits for all others, and NCCL waits for ever for one that
dies meanwhile. So a worker that comes during a run gets its first weights this way, which passes over the dead and
leaves the group as it is, and it joins with the next publication.
"""

from collections.abc import Sequence

from ray.actor import ActorHandle
from torch import Tensor

from cluster.weight_sync.manifest import Bucket, WeightSyncReport, plan_buckets, total_bytes
from cluster.weight_sync.transports import FullPayload
from learner.weight_sync.object_store import MAX_OBJECT_BYTES, WeightUpdate


class NewcomerUpdate:
    """Conducts one update of newcomers, from the buffer that the sender fills for everyone."""

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
