"""A learner rank that waits instead of computing and remembers which trajectories it was given.

Apart from the other actors of the soak, because the real rank behind it imports torch.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from ray.actor import ActorHandle
from torch import Tensor

from benchmarks.soak.actors import Delays
from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.contracts.metrics import Metric, Sum
from cluster.weight_sync.manifest import TensorSpec, WeightManifest, WeightSyncReport
from learner.weight_sync.object_store import ObjectStoreSender
from learner.worker import LearnerActor, RankRows

NUM_PARAMETERS, PARAMETER_VALUES = 4, 1 << 14  # of 64 KiB each in float32


@dataclass(frozen=True)
class LearnedRow:
    """One trajectory in one micro-batch."""

    trajectory_id: int
    staleness: int  # updates that this rank made since the oldest token was written


@dataclass(frozen=True)
class RankReport:
    """What one rank did since it was last asked."""

    rows: tuple[LearnedRow, ...]
    steps: tuple[int, ...]  # the optimizer steps that it was told to take


class StubParameters:
    """What a weight sender reads of an engine: parameters that all hold the number of the last update."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.student = SimpleNamespace(manifest=self._manifest)
        self.num_updates = 0

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Give whole parameters."""
        yield {name: torch.full((PARAMETER_VALUES,), float(self.num_updates)) for name in names}

    def _manifest(self, dtype: str) -> WeightManifest:
        names = [f"parameter_{index}" for index in range(NUM_PARAMETERS)]
        return WeightManifest(tuple(TensorSpec(name, (PARAMETER_VALUES,), dtype) for name in names))


class WaitingLearner:
    """A LearnerWorker without a model; it sends weights as the real one does."""

    def __init__(self, config: Config, rank: int, delays: Delays) -> None:
        self._rank, self._delays = rank, delays
        self._parameters = StubParameters(rank)
        engine: Any = self._parameters
        self._sender = ObjectStoreSender(engine, config.weight_sync, "float32", config.ray.call_timeout_seconds)
        self._num_rounds = 0
        self._rows: list[LearnedRow] = []
        self._steps: list[int] = []

    def accumulate(
        self, rows: RankRows, completes_step: bool, objective: ObjectiveConfig | None = None
    ) -> dict[str, Metric]:
        """Note the rows of the micro-batches, and wait."""
        versions = [int(version.as_py()) for batch in rows.batches for version in batch["min_policy_version"]]
        ids = [int(found.as_py()) for batch in rows.batches for found in batch["trajectory_id"]]
        named = [index for grid in rows.grids for grid_row in grid for index in grid_row]
        self._rows += [LearnedRow(ids[index], self._parameters.num_updates - versions[index]) for index in named]
        self._num_rounds += 1
        return self._wait("round", self._num_rounds)

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Count one more update."""
        self._steps.append(step)
        self._parameters.num_updates += 1
        return self._wait("step", step)

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the parameters to the rollout workers."""
        return self._sender.publish(rollout_workers, policy_version)

    def report(self) -> RankReport:
        """Return what was noted, and forget it."""
        report = RankReport(tuple(self._rows), tuple(self._steps))
        self._rows, self._steps = [], []
        return report

    def _wait(self, stage: str, number: int) -> dict[str, Metric]:
        seconds = self._delays.seconds(stage, self._rank, number)
        time.sleep(seconds)
        return {"busy_seconds": Sum(seconds)}


class WaitingLearnerActor(LearnerActor):
    """A LearnerActor with a waiting learner."""

    def __init__(self, config: Config, rank: int, world_size: int, delays: Delays) -> None:
        super().__init__(config, rank, world_size)
        self._delays = delays

    def start(self, address: str) -> None:
        """Build the worker; the ranks need not meet."""
        self._worker = WaitingLearner(self._config, self._rank, self._delays)  # type: ignore[assignment]

    def report(self) -> RankReport:
        """Return what this rank did since it was last asked."""
        report: RankReport = self._worker.report()  # type: ignore[attr-defined]
        return report
