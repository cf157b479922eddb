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
from tests.cluster.run.contexts import make_run_context
from tests.end_to_end.later_versions import LaterVersions

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900)]

STEPS, PROMPTS, SAMPLES = 5, 4, 4
SETTINGS = (
    f"teachers.countdown.model={EMBEDDED / 'student'}",
    "teachers.countdown.from=student",
    "teachers.countdown.engine.dtype=float32",
    "rollout.engine.dtype=float32",
    "learner.dtype=float32",
    "learner.num_workers=1",
    "learner.learning_rate=1e-3",
    "learner.warmup_steps=0",
    f"run.steps={STEPS}",
    f"prompts.prompts_per_step={PROMPTS}",
    f"rollout.samples_per_prompt={SAMPLES}",
    "rollout.rows_per_batch=2",
    "rollout.max_completion_tokens=24",
    "learner.zero_stage=0",
    "evaluation.num_prompts=1",
    "evaluation.teacher_too=false",
    "score_audit.rows=0",
    "checkpoint.every_steps=1",
    f"checkpoint.keep_last={STEPS}",
    "checkpoint.export=false",
    "ray.dashboard=false",
    # A student that only learns from itself stays where it is.
    "objective.preset=thinking-machines",
    "objective.terms.reward={loss='task_reward'}",
)


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
class Disturbed:
    """One run whose teacher takes every second step's weights, and what became of it from its checkpoints."""

    pools: Pools
    undisturbed: RunDirectory
    resumed: RunDirectory  # after step 3, when the teacher has the weights of step 2
    killed: RunDirectory  # resumed after step 1; its teacher's only worker dies in step 4


@pytest.fixture(scope="module")
def disturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disturbed]:
    folder = tmp_path_factory.mktemp("disturbed")
    config = configured(folder, "undisturbed", "{every=2}")
    with started(config) as pools:
        replicas = pools.pipeline.teachers.pools["countdown"].replicas

        def kill(step: int) -> None:
            if step == 3:  # it has the weights of step 2, and the student those of step 3
                ray.kill(replicas.actor(replicas.serving[0]))

        undisturbed = RunDirectory.create(config)
        pools.run(undisturbed)
        resumed, killed = (copy_until(undisturbed, step, folder / f"from-{step}") for step in (3, 1))
        pools.run(resumed, resumed=True)
        pools.run(killed, resumed=True, before_step=kill)
        yield Disturbed(pools, undisturbed, resumed, killed)


@dataclass
class Kinds:
    """Runs whose teachers follow the student at once, and one that runs ahead of its average."""

    inputs: Inputs
    live: RunDirectory
    every_one: RunDirectory
    ahead: RunDirectory
    ahead_rows: list[list[int]]


@pytest.fixture(scope="module")
def kinds(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kinds]:
    folder = tmp_path_factory.mktemp("kinds")
    configs = [
        configured(folder, "live", "live", "run.steps=3"),
        configured(folder, "every_one", "{every=1}", "run.steps=3"),
        configured(folder, "ahead", "{ema=0.5}", "rollout.max_staleness=2"),
    ]
    directories = [RunDirectory.create(config) for config in configs]
    with started(configs[0]) as pools:
        pools.run(directories[0])
        for config, directory in zip(configs[1:], directories[1:], strict=True):
            pools.start_anew(config)
            rows = pools.run(directory)
        yield Kinds(pools.inputs, *directories, ahead_rows=rows)


def test_the_student_as_its_own_teacher_loses_nothing(kinds: Kinds) -> None:
    for record in records(kinds.live):  # the reward alone moves it
        assert abs(record["train/kl"]) < 1e-5
        assert abs(record["teacher/sampled_kl"]) < 1e-5
    assert abs(records(kinds.ahead)[-1]["train/kl"]) > 1e-4  # an average is another model


def test_every_step_is_as_live_as_live(kinds: Kinds) -> None:
    assert versions(kinds.live) == versions(kinds.every_one) == [(0, 0), (1, 1), (2, 2)]
    assert losses(kinds.every_one) == pytest.approx(losses(kinds.live), abs=1e-6)


def test_rows_of_a_run_ahead_are_scored_by_the_teacher_of_their_moment(kinds: Kinds) -> None:
    for step, rows in enumerate(kinds.ahead_rows):
        assert len(rows) == PROMPTS * SAMPLES
        assert all(step - 2 <= version <= step for version in rows)
        assert versions(kinds.ahead)[step] == (min(rows), max(rows))
        record = records(kinds.ahead)[step]
        assert record["teacher_age/max"] == step - min(rows)
        assert record["teacher_age/mean"] == pytest.approx(step - sum(rows) / len(rows))
    assert set(kinds.ahead_rows[2]) != {2}  # some were scored before the steps before were learned from


def test_every_step_is_scored_by_the_version_of_its_refresh(disturbed: Disturbed) -> None:
    assert versions(disturbed.undisturbed) == [(0, 0), (0, 0), (2, 2), (2, 2), (4, 4)]
    assert [record["teacher_age/max"] for record in records(disturbed.undisturbed)] == [0, 1, 0, 1, 0]
    assert abs(records(disturbed.undisturbed)[1]["train/kl"]) > 1e-4  # the teacher is one step behind


def test_a_resumed_run_has_the_same_versions_and_losses(disturbed: Disturbed) -> None:
    assert versions(disturbed.resumed) == versions(disturbed.undisturbed)
    assert losses(disturbed.resumed) == pytest.approx(losses(disturbed.undisturbed), abs=1e-5)


def test_a_teacher_that_died_comes_back_with_the_weights_that_it_had(disturbed: Disturbed) -> None:
    assert disturbed.pools.pipeline.teachers.pools["countdown"].replicas.num_restarts == 1
    assert versions(disturbed.killed) == versions(disturbed.undisturbed)
    assert losses(disturbed.killed) == pytest.approx(losses(disturbed.undisturbed), abs=1e-5)
    killed, undisturbed = (read_ledger(run.ledger) for run in (disturbed.killed, disturbed.undisturbed))
    assert [record.trajectory_ids for record in killed] == [record.trajectory_ids for record in undisturbed]


def check_ledger(directory: RunDirectory, inputs: Inputs) -> None:
    """Audit a ledger; the policy versions of this test's runs go on from those before."""
    config, ledger = directory.read_config(), read_ledger(directory.ledger)
    checked = [msgspec.structs.replace(record, policy_versions=(at, at)) for at, record in enumerate(ledger)]
    assert audit(checked, config, inputs.train) == config.run.steps * PROMPTS


def test_the_ledgers_say_that_every_version_was_due(disturbed: Disturbed) -> None:
    for directory in (disturbed.undisturbed, disturbed.resumed, disturbed.killed):
        check_ledger(directory, disturbed.pools.inputs)


def test_the_ledger_of_a_run_ahead_says_so_too(kinds: Kinds) -> None:
    for directory in (kinds.live, kinds.every_one, kinds.ahead):
        check_ledger(directory, kinds.inputs)
