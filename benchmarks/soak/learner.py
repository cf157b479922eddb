"""A learner rank that waits instead of computing and remembers which trajectories it was given.

Apart from the other actors of the soak, because the real rank behind it imports torch.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.soak.actors import Delays
from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.contracts.metrics import Metric, Sum
from cluster.contracts.wire import from_wire
from cluster.weight_sync.manifest import Manifest, TensorSpec
from learner.batching.arrivals import RankShare
from learner.weight_sync.object_store import ObjectStoreSender
from learner.worker import LearnerActor

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

    def _manifest(self, dtype: str) -> Manifest:
        names = [f"parameter_{index}" for index in range(NUM_PARAMETERS)]
        return [TensorSpec(name, (PARAMETER_VALUES,), dtype) for name in names]


class WaitingLearner(LearnerActor):
    """Waits instead of computing; sends weights as the real learner does."""

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        delays: Delays,
        fetch: Callable[[Sequence[Any]], list[Any]] | None = None,
    ) -> None:
        super().__init__(config, rank, world_size, fetch)
        self._delays = delays
        self._parameters = StubParameters(rank)
        engine: Any = self._parameters
        self._sender = ObjectStoreSender(engine, config.weight_sync, "float32", config.ray.call_timeout_seconds)
        self._num_rounds = 0
        self._rows: list[LearnedRow] = []
        self._steps: list[int] = []

    def start(self, address: str) -> None:
        """Load nothing; the ranks need not meet."""

    def accumulate(
        self, share: RankShare, completes_step: bool, objective: ObjectiveConfig | None = None
    ) -> dict[str, Metric]:
        """Note the rows of the micro-batches, and wait."""
        batches = [from_wire(wire) for wire in self._fetch(share.references)]
        versions = [int(version.as_py()) for batch in batches for version in batch["min_policy_version"]]
        ids = [int(id_.as_py()) for batch in batches for id_ in batch["trajectory_id"]]
        named = [index for grid in share.grids for grid_row in grid for index in grid_row]
        self._rows += [LearnedRow(ids[index], self._parameters.num_updates - versions[index]) for index in named]
        self._num_rounds += 1
        return self._wait("round", self._num_rounds)

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        """Count one more update."""
        self._steps.append(step)
        self._parameters.num_updates += 1
        return self._wait("step", step)

    def report(self) -> RankReport:
        """Return what was noted, and forget it."""
        report = RankReport(tuple(self._rows), tuple(self._steps))
        self._rows, self._steps = [], []
        return report

    def _wait(self, stage: str, number: int) -> dict[str, Metric]:
        seconds = self._delays.seconds(stage, self._rank, number)
        time.sleep(seconds)
        return {"busy_seconds": Sum(seconds)}
