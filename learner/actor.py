"""What runs in each Ray actor of the learner: one rank behind calls that pass references and figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.contracts.config import Config
from cluster.contracts.metrics import Metric
from cluster.contracts.objective import ObjectiveConfig
from cluster.contracts.trajectory import Floats
from cluster.contracts.weights import WeightSyncReport
from cluster.contracts.wire import from_wire
from learner.arrivals import Share
from learner.manifest import WrittenShard
from learner.rendezvous import free_address
from learner.worker import LearnerWorker, RankRows, start_worker


class LearnerActor:
    """A LearnerWorker behind Ray: fetches what references point to, and passes everything else on."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._config = config
        self._rank, self._world_size = rank, world_size
        self._worker: LearnerWorker

    def address(self) -> str:
        """Return where the group meets; asked of rank 0."""
        return free_address()

    def start(self, address: str) -> None:
        """Load the student and join the group."""
        self._worker = start_worker(self._config, self._rank, self._world_size, address)

    def read_teacher_heads(self, config: Config) -> None:
        """Read the LM heads of a configuration's teachers in place of those before."""
        self._worker.read_teacher_heads(config)

    def accumulate(self, share: Share, completes_step: bool, objective: ObjectiveConfig | None) -> dict[str, Metric]:
        """Add the gradients of this rank's share of a round."""
        wires = ray.get(list(share.references), timeout=self._config.ray.call_timeout_seconds)
        batches = [from_wire(wire, stage="scored") for wire in wires]
        return self._worker.accumulate(RankRows(batches, share.task_advantages, share.grids), completes_step, objective)

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Update the weights with the gradients added up."""
        return self._worker.take_step(num_tokens, step)

    def discard_step(self, num_tokens: int) -> dict[str, Metric]:
        """Measure the gradients added up and clear them."""
        return self._worker.discard_step(num_tokens)

    def student_logprobs(self, references: Sequence[Any]) -> Floats | None:
        """Return the log-probabilities of one batch on rank 0, and nothing on the others."""
        (wire,) = ray.get(list(references), timeout=self._config.ray.call_timeout_seconds)
        logprobs = self._worker.student_logprobs(from_wire(wire))
        return logprobs if self._rank == 0 else None

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the weights to the rollout workers."""
        return self._worker.publish_weights(rollout_workers, policy_version)

    def begin_shard(self, partial: Path) -> float:
        """Begin to write this rank's part of a checkpoint."""
        return self._worker.begin_shard(partial)

    def shard_is_written(self) -> bool:
        """Return whether it is written."""
        return self._worker.shard_is_written()

    def finish_shard(self) -> WrittenShard:
        """Wait until it is written."""
        return self._worker.finish_shard()

    def load_shard(self, folder: Path) -> None:
        """Restore this rank's part of a checkpoint."""
        self._worker.load_shard(folder)

    def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face directory."""
        self._worker.export(folder)

    def shutdown(self) -> None:
        """End nothing: a rank starts no process of its own."""
