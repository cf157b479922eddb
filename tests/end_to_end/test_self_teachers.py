"""Teachers that are the student itself, through real pools: what they score with, and that nothing disturbs it."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray

from cluster.commands import step_hooks
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle
from cluster.contracts.files import Record
from cluster.contracts.wire import from_wire
from cluster.demo import EMBEDDED, embedded_config
from cluster.placement.placement import cluster_nodes, plan_placement
from cluster.run.checkpoints import find_resume_point
from cluster.run.driver import train
from cluster.run.hooks import Hooks, RunContext, StepHook
from cluster.run.inputs import Inputs, load_inputs
from cluster.run.ledger import audit, read_ledger
from cluster.run.pools import Pipeline, start_pipeline
from learner.checkpointing.checkpoint import step_folder
from learner.group import LearnerGroup
from tests.cluster.run.contexts import make_run_context

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900)]

STEPS = 5
SETTINGS = (
    f"teachers.countdown.model={EMBEDDED / 'student'}",
    "teachers.countdown.from=student",
    "teachers.countdown.engine.dtype=float32",
    "rollout.engine.dtype=float32",
    "learner.dtype=float32",
    "learner.learning_rate=1e-3",
    "learner.warmup_steps=0",
    f"run.steps={STEPS}",
    "prompts.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "rollout.rows_per_batch=4",
    "evaluation.num_prompts=4",
    "evaluation.teacher_too=false",
    "checkpoint.every_steps=1",
    f"checkpoint.keep_last={STEPS}",
    "checkpoint.export=false",
    "ray.dashboard=false",
    # A student that only learns from itself stays where it is.
    "objective.preset=thinking-machines",
    "objective.terms.reward={loss='task_reward'}",
)


class LaterVersions:
    """A learner whose policy versions go on from those that the rollout workers have seen."""

    def __init__(self, learner: LearnerGroup) -> None:
        self._learner = learner
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def publish_weights(self, workers: Any, policy_version: int) -> Any:
        self._next += 1
        return self._learner.publish_weights(workers, self._next - 1)


class Rows(StepHook):
    """Keeps the versions that every row of every step was scored by."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self.versions: list[list[int]] = []

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        rows: list[int] = []
        for handle in batches:
            in_rows = from_wire(ray.get(handle.reference), "scored")["teacher_version"].to_pylist()
            assert set(in_rows) == {handle.teacher_versions["countdown"]}
            rows += in_rows
        self.versions.append(rows)
        return {}


@dataclass
class Pools:
    """The pools of several runs, one after the other."""

    config: Config
    inputs: Inputs
    pipeline: Pipeline

    def start_anew(self, config: Config) -> None:
        """Give the learner the student of the beginning, and what the next run says of its teachers."""
        self.config = config
        self.pipeline.learner.replace_teachers(config.teachers, first_step=0)
        self.pipeline.learner.start_again()
        self.pipeline.teachers.abandon()

    def run(
        self, directory: RunDirectory, resumed: bool = False, before_step: Callable[[int], None] = lambda step: None
    ) -> list[list[int]]:
        """Train, as the supervisor does, and return the versions of each step's rows."""
        state = find_resume_point(directory, self.config, pytest.fail) if resumed else None
        first_step = 0 if state is None else state.step
        run = make_run_context(self.config, self.inputs, self.pipeline, directory, first_step)
        hooks = step_hooks(run)
        rows = Rows(run)
        rows.before_step = before_step  # type: ignore[method-assign]
        if state is not None:
            run.teacher_states = dict(state.teachers)
            run.ledger.check(state.ledger)
            self.pipeline.learner.load_checkpoint(step_folder(directory.checkpoints, state.step))
        train(run, Hooks([*hooks[:-1], rows, hooks[-1]]))
        return rows.versions


def configured(folder: Path, name: str, refresh: str, *overrides: str) -> Config:
    return embedded_config(
        [*SETTINGS, f"teachers.countdown.refresh={refresh}", f"run.directory={folder}", f"run.name={name}", *overrides]
    )


@contextmanager
def started(config: Config) -> Iterator[Pools]:
    inputs = load_inputs(config)
    with start_pipeline(config, inputs, plan_placement(config, cluster_nodes())) as running:
        learner: Any = LaterVersions(running.learner)
        yield Pools(config, inputs, replace(running, learner=learner))


def copy_until(directory: RunDirectory, step: int, path: Path) -> RunDirectory:
    shutil.copytree(directory.path, path)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(path / "checkpoints" / f"step-{later}")
    return RunDirectory.open(path)


def records(directory: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in directory.metrics.read_text().splitlines()]


def losses(directory: RunDirectory) -> list[float]:
    return [record["train/loss"] for record in records(directory)]


def versions(directory: RunDirectory) -> list[tuple[int, int]]:
    return [record.teacher_versions["countdown"] for record in read_ledger(directory.ledger)]


@dataclass
class Results:
    """What the runs of one session left."""

    pools: Pools
    undisturbed: RunDirectory
    killed: RunDirectory
    resumed: dict[int, RunDirectory]
    ahead: RunDirectory
    ahead_rows: list[list[int]]
    live: RunDirectory
    every_one: RunDirectory


@pytest.fixture(scope="module")
def results(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Results]:
    """Run with a teacher of every second step: undisturbed, with a death, resumed, ahead; then live, and every step."""
    folder = tmp_path_factory.mktemp("selves")
    config = configured(folder, "undisturbed", "{every=2}")
    with started(config) as pools:
        replicas = pools.pipeline.teachers.pools["countdown"].replicas

        def kill(step: int) -> None:
            if step == 3:  # it has the weights of step 2, and the student those of step 3
                ray.kill(replicas.actor(replicas.serving[0]))

        undisturbed = RunDirectory.create(config)
        pools.run(undisturbed)
        resumed = {}
        for step in (1, 3):
            resumed[step] = copy_until(undisturbed, step, folder / f"from-{step}")
            pools.run(resumed[step], resumed=True)
        runs = {}
        for name, refresh, overrides in (
            ("killed", "{every=2}", ()),
            ("ahead", "{ema=0.5}", ("rollout.max_staleness=2",)),
            ("live", "live", ()),
            ("every_one", "{every=1}", ()),
        ):
            pools.start_anew(configured(folder, name, refresh, *overrides))
            runs[name] = RunDirectory.create(pools.config)
            rows = pools.run(runs[name], before_step=kill if name == "killed" else lambda step: None)
            if name == "ahead":
                ahead_rows = rows
        yield Results(pools, undisturbed, resumed=resumed, ahead_rows=ahead_rows, **runs)


def test_the_student_as_its_own_teacher_loses_nothing_at_first(results: Results) -> None:
    first = records(results.live)[0]
    assert abs(first["train/kl"]) < 1e-5
    assert abs(first["teacher/sampled_kl"]) < 1e-5
    later = records(results.undisturbed)[1]  # the teacher is one step behind
    assert abs(later["train/kl"]) > 1e-4


def test_every_step_is_scored_by_the_version_of_its_refresh(results: Results) -> None:
    assert versions(results.undisturbed) == [(0, 0), (0, 0), (2, 2), (2, 2), (4, 4)]
    assert versions(results.live) == [(step, step) for step in range(STEPS)]
    assert [record["teacher_age/max"] for record in records(results.undisturbed)] == [0, 1, 0, 1, 0]


def test_every_step_is_as_live_as_live(results: Results) -> None:
    assert versions(results.every_one) == versions(results.live)
    assert losses(results.every_one) == pytest.approx(losses(results.live), abs=1e-6)


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_has_the_same_versions_and_losses(results: Results, step: int) -> None:
    assert versions(results.resumed[step]) == versions(results.undisturbed)
    assert losses(results.resumed[step]) == pytest.approx(losses(results.undisturbed), abs=1e-5)


def test_a_teacher_that_died_comes_back_with_the_weights_of_the_others(results: Results) -> None:
    assert results.pools.pipeline.teachers.pools["countdown"].replicas.num_restarts == 1
    assert versions(results.killed) == versions(results.undisturbed)
    assert losses(results.killed) == pytest.approx(losses(results.undisturbed), abs=1e-5)
    disturbed, other = (read_ledger(run.ledger) for run in (results.killed, results.undisturbed))
    assert [record.trajectory_ids for record in disturbed] == [record.trajectory_ids for record in other]


def test_rows_of_a_run_ahead_are_scored_by_the_teacher_of_their_moment(results: Results) -> None:
    for step, rows in enumerate(results.ahead_rows):
        assert len(rows) == 8 * 4
        assert all(step - 2 <= version <= step for version in rows)
        assert versions(results.ahead)[step] == (min(rows), max(rows))
        record = records(results.ahead)[step]
        assert record["teacher_age/max"] == step - min(rows)
        assert record["teacher_age/mean"] == pytest.approx(step - sum(rows) / len(rows))
    assert set(results.ahead_rows[2]) != {2}  # some were scored before step 2 was learned from


def test_the_ledgers_say_that_every_version_was_due(results: Results) -> None:
    for directory in (results.undisturbed, results.killed, results.live, results.ahead, *results.resumed.values()):
        config, ledger = directory.read_config(), read_ledger(directory.ledger)
        # The policy versions of this test's runs go on from those before.
        records = [msgspec.structs.replace(record, policy_versions=(at, at)) for at, record in enumerate(ledger)]
        assert audit(records, config, results.pools.inputs.train) == STEPS * 8
