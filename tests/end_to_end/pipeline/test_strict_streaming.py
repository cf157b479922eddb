"""The driver with `max_staleness = 0` against one stage after the other, on the same real pools."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from cluster.commands import step_hooks
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle, BatchSource, ReadyBatches
from cluster.contracts.metrics import Metric
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import from_wire
from cluster.demo import EMBEDDED, embedded_config
from cluster.run.driver import train
from cluster.run.hooks import Hooks
from cluster.run.inputs import Inputs, load_inputs, train_requests, train_sampling
from cluster.run.pools import Pipeline
from learner.group import LearnerGroup
from tests.cluster.run.contexts import make_run_context
from tests.end_to_end.later_versions import LaterVersions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 3
SETTINGS = (
    f"run.steps={STEPS}",
    "run.name=strict",
    "objective.preset=gkd",
    "prompts.prompts_per_step=32",
    "rollout.rows_per_batch=4",
    "evaluation.num_prompts=4",
    "checkpoint.export=false",
    "ray.dashboard=false",
)

Rows = dict[int, list[int]]  # trajectory id -> its tokens


class Recorder:
    """A learner that notes what each of its steps learned from, and whether it did while the last rows were missing."""

    def __init__(self, learner: LearnerGroup) -> None:
        self._learner = learner
        self.rows: list[Rows] = []
        self.began_early: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def step(self, batches: BatchSource, step: int) -> dict[str, Metric]:
        noted = Noted(batches)
        figures = self._learner.step(noted, step)
        wires = [ray.get(handle.reference) for handle in noted.handles]
        self.rows.append({key: ids for wire in wires for key, ids in rows_of(wire).items()})
        self.began_early.append(noted.began_early)
        return figures


class Noted:
    """A BatchSource that notes what it gives out; the last batch of a step that comes with others comes after them.

    Otherwise a busy machine may have all of them there before the learner takes the first.
    """

    def __init__(self, batches: BatchSource) -> None:
        self._batches = batches
        self._late: list[BatchHandle] = []
        self.handles: list[BatchHandle] = []
        self.began_early = False  # ranks had something to compute when a further batch was taken

    @property
    def is_exhausted(self) -> bool:
        return self._batches.is_exhausted and not self._late

    @property
    def missing(self) -> int:
        return self._batches.missing + sum(handle.num_episodes for handle in self._late)

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        self.began_early |= bool(wake_on)
        if self._late:
            taken, self._late = self._late, []
        else:
            taken = self._batches.take(wake_on)
            if self._batches.is_exhausted and len(taken) > 1:
                self._late = [taken.pop()]
        self.handles += taken
        return taken

    def move_on_until(self, references: Sequence[Any]) -> None:
        self._batches.move_on_until(references)


def rows_of(wire: Any) -> Rows:
    batch = from_wire(wire, "scored")
    token_ids = ragged(batch, "token_ids")
    return {key: token_ids[row].tolist() for row, key in enumerate(batch["trajectory_id"].to_pylist())}


def one_stage_after_the_other(config: Config, inputs: Inputs, pipeline: Pipeline, learner: Recorder) -> None:
    for step in range(STEPS):
        requests = train_requests(config, inputs, step)
        written = list(pipeline.rollouts.generate(requests, train_sampling(config)))
        learner.step(ReadyBatches(pipeline.teachers.score(written, config.scorers)), step)
        learner.publish_weights(pipeline.rollouts.actors, policy_version=step + 1)


@pytest.fixture(scope="module")
def two_ways(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train twice from the same weights; return what each learned from, and the weights that it led to."""
    folder = tmp_path_factory.mktemp("strict")
    config = embedded_config([*SETTINGS, f"run.directory={folder}"])
    inputs = load_inputs(config)
    found: dict[str, Any] = {}
    recorder = Recorder(pipeline.learner)
    pipeline.learner.begin_checkpoint(folder / "start", {}).complete()
    pipeline.learner.publish_weights(pipeline.rollouts.actors, policy_version=0)
    one_stage_after_the_other(config, inputs, pipeline, recorder)
    found["apart"] = recorder, weights(pipeline.learner, folder / "apart")

    pipeline.learner.load_checkpoint(folder / "start")
    recorder = Recorder(LaterVersions(pipeline.learner, STEPS + 1))
    streamed = replace(pipeline, learner=recorder)
    run = make_run_context(config, inputs, streamed, RunDirectory.create(config))
    train(run, Hooks(step_hooks(run)))
    found["streamed"] = recorder, weights(pipeline.learner, folder / "streamed")

    pipeline.learner.load_checkpoint(folder / "start")  # others look at the untrained student
    pipeline.learner.publish_weights(pipeline.rollouts.actors, policy_version=2 * STEPS + 2)
    return found


def weights(learner: LearnerGroup, folder: Path) -> dict[str, torch.Tensor]:
    learner.export(folder)
    return load_file(folder / "model.safetensors")


def test_streaming_learns_from_the_same_rows_in_the_same_steps(two_ways: dict[str, Any]) -> None:
    apart, streamed = two_ways["apart"][0], two_ways["streamed"][0]
    assert [len(rows) for rows in streamed.rows] == [32] * STEPS
    assert streamed.rows == apart.rows


def test_streaming_learns_before_the_last_row_has_come(two_ways: dict[str, Any]) -> None:
    assert two_ways["streamed"][0].began_early == [True] * STEPS


def test_streaming_leads_to_the_same_weights(two_ways: dict[str, Any]) -> None:
    apart, streamed = two_ways["apart"][1], two_ways["streamed"][1]
    before = load_file(EMBEDDED / "student" / "model.safetensors")
    assert set(apart) == set(streamed)
    # Gradients are added up in another order, and AdamW's first steps divide each by its own size: an element whose
    # gradient rounds to 0 in one order may move by the learning rate in the other. So all elements count together: the
    # order of summation gives about 1e-5 of the way, and a row that is lost changes a thirty-second of each gradient.
    way = distance(apart, before)
    assert distance(streamed, apart) < 1e-3 * way


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5
