"""The loop calls its hooks around each step; README shows the loop as it is."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle, BatchSource
from cluster.contracts.errors import TrainingError
from cluster.contracts.files import Record
from cluster.contracts.metrics import Mean, Metric, Sum
from cluster.run.driver import train
from cluster.run.hooks import Hooks, RunContext, StepHook
from cluster.run.inputs import Inputs
from cluster.simulation.simulated_run import Demand, Split, build
from cluster.weight_sync.manifest import WeightSyncReport
from learner.group import LearnerGroup
from rollout_workers.prompts import PromptOrder, PromptSet
from tests.builders import make_config
from tests.cluster.run.contexts import make_run_context
from tests.cluster.simulation.rates_builder import make_rates

README = Path(__file__).parents[3] / "README.md"


@dataclass
class Learner:
    """Learns from simulated batches, and reports what a real group does."""

    group: LearnerGroup

    def step(self, batches: BatchSource, step: int) -> dict[str, Metric]:
        self.group.step(batches, step)
        return {"kl": Mean(1.0, 2), "busy_seconds": Sum(1.0)}

    def publish_weights(self, workers: Sequence[Any], policy_version: int) -> WeightSyncReport:
        return WeightSyncReport(policy_version, "", 0, 0.0)

    def bring_weights(self, worker: Any) -> None:
        """Bring nothing."""


class Events(StepHook):
    """Notes its calls in a list that hooks share."""

    def __init__(self, run: RunContext, name: str, events: list[str]) -> None:
        super().__init__(run)
        self.name, self.events = name, events

    def begin(self) -> None:
        self.events.append(f"{self.name} begins")

    def before_step(self, step: int) -> None:
        self.events.append(f"{self.name} before {step}")

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        rows = sum(len(handle.trajectory_ids) for handle in batches)
        self.events.append(f"{self.name} after {step}, {rows} rows, {sorted(set(metrics) & {'first', 'second'})}")
        return {self.name: 1.0}

    def end(self, error: BaseException | None) -> None:
        self.events.append(f"{self.name} ends with {error}")


def make_run(folder: Path) -> RunContext:
    config = make_config(
        f"run.directory={folder}", "run.steps=3", "prompts.prompts_per_step=4", "rollout.max_staleness=1"
    )
    simulated = build(config, make_rates(), Split(1, {"main": 1}, 1), Demand(config, make_rates()))
    pipeline: Any = SimpleNamespace(
        rollouts=simulated.rollouts, teachers=simulated.teachers, learner=Learner(simulated.learner)
    )
    inputs = Inputs(PromptSet.of_token_ids([[1]] * 12, "main"), PromptOrder(12, 0, shuffle=False), (), 8)
    run = make_run_context(config, inputs, pipeline, RunDirectory.create(config))
    # Simulated batches have no policy versions, which a real ledger records.
    ledger: Any = SimpleNamespace(admit=lambda step, requests: None, watch=lambda step, batches: batches)
    run.ledger = ledger
    return run


def test_hooks_are_called_in_order_around_each_step_and_end_in_the_opposite_order(tmp_path: Path) -> None:
    run, events = make_run(tmp_path), list[str]()
    hooks = Hooks([Events(run, name, events) for name in ("first", "second")])
    with hooks.ending():
        train(run, hooks)
    assert events == [
        *("first begins", "second begins"),
        *("first before 0", "second before 0", "first before 1", "second before 1"),  # one step ahead
        *("first after 1, 4 rows, []", "second after 1, 4 rows, ['first']"),
        *("first before 2", "second before 2"),
        *("first after 2, 4 rows, []", "second after 2, 4 rows, ['first']"),
        *("first after 3, 4 rows, []", "second after 3, 4 rows, ['first']"),
        *("second ends with None", "first ends with None"),
    ]


def test_every_hook_ends_when_one_of_them_ends_the_run(tmp_path: Path) -> None:
    run, events = make_run(tmp_path), list[str]()

    class Fails(StepHook):
        def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
            raise TrainingError("enough")

    hooks = Hooks([Events(run, "first", events), Fails(run), Events(run, "second", events)])
    with pytest.raises(TrainingError, match="enough"), hooks.ending():
        train(run, hooks)
    assert events[-3:] == ["first after 1, 4 rows, []", "second ends with enough", "first ends with enough"]


def test_the_loop_in_the_readme_is_that_of_the_driver() -> None:
    source = inspect.getsource(train)
    [shown] = [block for block in README.read_text().split("```") if block.startswith("python\nfor step in")]
    assert shown.removeprefix("python").split() == source[source.index("for step in") :].split()
