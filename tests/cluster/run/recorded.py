"""A record of a small run, whose rows differ in everything that a replay may confuse."""

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.recorded_rows import RecordedBatch, RecordedRows
from cluster.contracts.trajectory import add_scores, make_generated
from tests.builders import make_config, make_scores, make_trajectory

PROMPTS_PER_STEP, SAMPLES, TOP_K = 3, 2, 2
PER_STEP = PROMPTS_PER_STEP * SAMPLES
ARRIVALS = ((4, 1), (0, 5), (2, 3))  # places of a step's trajectories, by batch, in the order in which they came
SETTINGS = (
    f"prompts.prompts_per_step={PROMPTS_PER_STEP}",
    f"rollout.samples_per_prompt={SAMPLES}",
    f"objective.support_size={TOP_K}",
)


class Store:
    """Keeps what is put as workers find it."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self._numbers = count()

    def put(self, value: Any) -> int:
        number = next(self._numbers)
        self.values[number] = value.joined()
        return number

    def get(self, references: Any, timeout_seconds: float, waiting_for: str) -> Any:
        return [self.values[reference] for reference in references]


def config_of(folder: Path, *overrides: str, name: str = "recorded") -> Config:
    return make_config(*SETTINGS, f"run.directory={folder}", f"run.name={name}", *overrides)


def replaying(folder: Path, *overrides: str) -> Config:
    return config_of(folder, f"rollout.replay={folder / 'recorded'}", *overrides, name="replaying")


def scored(ids: tuple[int, ...], step: int, logprob: float = -1.0) -> pa.RecordBatch:
    """Return rows of step `step`, from 1, whose prompt is 10 times the step and whose reward is the id's parity."""
    rows = [
        make_trajectory(
            completion=range(3, 4 + one % 4),
            trajectory_id=one,
            prompt_id=10 * step + one // SAMPLES,
            sample_index=one % SAMPLES,
            reward=float(one % 2),
            min_policy_version=step - 1,
            max_policy_version=step - 1,
        )
        for one in ids
    ]
    generated = make_generated(rows)
    return add_scores(generated, "teacher", make_scores(sum(1 + one % 4 for one in ids), TOP_K, logprob))


def record_steps(folder: Path, steps: int = 2, prompts: str = "p") -> RunDirectory:
    """Record a run; the steps' trajectories are numbered as those of a run are."""
    directory = RunDirectory.create(config_of(folder, "rollout.record=true"))
    for step in range(1, steps + 1):
        record_step(directory, step, prompts)
    return directory


def record_step(directory: RunDirectory, step: int, prompts: str = "p") -> list[pa.RecordBatch]:
    first = (step - 1) * PER_STEP
    batches = [scored(tuple(first + place for place in places), step) for places in ARRIVALS]
    recorded = [RecordedBatch(batch, {"main": "checkpoint"}, {}) for batch in batches]
    RecordedRows(directory.rows).write(step, recorded, prompts)
    return batches


def token_ids(batch: pa.RecordBatch) -> list[list[int]]:
    return [list(np.asarray(row)) for row in batch["token_ids"].to_pylist()]
