"""A learner rank that only waits; a module of its own, so that Ray can import it."""

import time
from collections.abc import Sequence
from typing import Any

from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import Max, Mean, Metric, Sum
from cluster.weight_sync.manifest import WeightSyncReport
from learner.batching.arrivals import RankShare


class StubRank:
    """Answers as LearnerActor does; computes one token per millisecond, and fails on an empty trajectory."""

    def __init__(self, config: Config, rank: int, world_size: int) -> None:
        self._head = 0.0

    def read_teacher_heads(self, config: Config) -> None:
        """Read nothing; models are numbers here."""
        self._head = float(config.teachers["only"].model)

    def address(self) -> str:
        return "nowhere"

    def start(self, address: str) -> None:
        """Load nothing."""

    def accumulate(
        self, share: RankShare, completes_step: bool, objective: ObjectiveConfig | None
    ) -> dict[str, Metric]:
        # The tests give each batch one row, and its length for a reference.
        tokens = sum(share.references[index] for grid in share.grids for row in grid for index in row)
        if not tokens:
            raise ScoreError("the stub refuses an empty trajectory")
        time.sleep(tokens / 1000)
        return {
            **{f"{name}_mean": Max(mean) for name, mean in share.step_means.items()},
            "step_of_weights": Max(float(share.step)),
            "tokens": Sum(float(tokens)),
            "rounds": Sum(1.0),
            "micro_batches": Sum(float(len(share.grids))),
            "completing_rounds": Sum(float(completes_step)),
            "largest_round_tokens": Max(float(tokens)),
            "busy_seconds": Sum(tokens / 1000),
        }

    def advantage_sums(self, share: RankShare, objective: ObjectiveConfig | None) -> dict[str, Metric]:
        """Say that every token has its trajectory's length for an advantage."""
        lengths = [share.references[index] for grid in share.grids for row in grid for index in row]
        return {"main": Mean(sum(length**2 for length in lengths), sum(lengths)), "busy_seconds": Sum(0.0)}

    def take_step(self, num_tokens: int, step: int) -> dict[str, Metric]:
        return {"busy_seconds": Sum(0.0), "teacher_head": Max(self._head), "step": Max(float(step))}

    def publish_weights(self, workers: Sequence[Any], policy_version: int) -> WeightSyncReport:
        """Send nothing."""
        return WeightSyncReport(policy_version, "", 0, 0.0)

    def shutdown(self) -> None:
        """End nothing."""
