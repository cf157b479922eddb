import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.commands import step_hooks
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle, PoolState, ReadyBatches, Span
from cluster.contracts.errors import ActorDiedError, CheckpointError, PreceptorError, RunStopped, TrainingError
from cluster.contracts.files import RecordsFile
from cluster.contracts.requests import RolloutRequest
from cluster.demo import embedded_config
from cluster.monitoring.status import read_report
from cluster.monitoring.status_file import KeptStatus
from cluster.run.evaluation import Evaluation, write_samples
from cluster.run.hooks import Hooks, RunContext
from cluster.run.inputs import Inputs, load_inputs
from cluster.run.step_metrics import DEFAULTS
from cluster.run.summary import RunSummary, summary
from cluster.weight_sync.manifest import checksum
from learner.checkpointing.checkpoint import CheckpointSeconds
from teacher_workers.replacement import ReplaceableTeachers
from tests.builders import make_config
from tests.cluster.run.contexts import make_run_context


def test_the_last_line_compares_student_and_teacher() -> None:
    history = RunSummary({"main": 1.0}, first_accuracy=0.4901, last_accuracy=0.899, first_kl=0.5, last_kl=0.1)
    assert summary(make_config(), history, seconds=75.2, steps=60) == [
        "60 steps in 75 s",
        "KL to the teacher per token: 0.5000 -> 0.1000",
        "held-out accuracy: student 0.49 -> 0.90, teacher 1.00",
    ]


def test_several_teachers_are_named() -> None:
    config = make_config("teachers.code.model=c")
    history = RunSummary({"main": 1.0, "code": 0.5}, first_accuracy=0.1, last_accuracy=0.2)
    assert summary(config, history, 1.0, 1)[-1].endswith("teacher main 1.00, teacher code 0.50")


def make_evaluation(kl: float, completion: str) -> Evaluation:
    return Evaluation({"kl": kl, "completion_length": 3.0}, [{"prompt": "p", "completion": completion}])


def test_without_answers_a_sample_and_the_kl_before_and_after_are_shown() -> None:
    history = RunSummary()
    for kl, completion in ((2.0, "a\nb"), (1.5, "between"), (1.0, "c" * 300)):
        history.note_evaluation(make_evaluation(kl, completion))
    lines = summary(make_config(), history, 1.0, 1)
    assert lines[:2] == ['prompt: "p"', 'before: "a\\nb"']
    assert lines[2] == f'after:  "{"c" * 240}..."'
    assert lines[-1] == "KL to the teacher per token: 2.0000 -> 1.0000"


class ScriptedLearner:
    """Notes the checkpoints that it is asked for, and those that were completed."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.states: list[dict[str, Any]] = []
        self.checkpoints: list[str] = []
        self.is_fast = True
        self.error: CheckpointError | None = None

    def export(self, folder: Path) -> None:
        """Write nothing."""

    def take_spans(self) -> list[Span]:
        return [Span("learner", "learner-0", "learn", 0.0, 1.0)]

    def state(self) -> PoolState:
        return PoolState("learner", ["learner-0"], 1, 0)

    def begin_checkpoint(self, folder: Path, state: Any) -> "ScriptedCheckpoint":
        self.begun.append(folder.name)
        self.states.append(state)
        return ScriptedCheckpoint(self, folder)


class ScriptedCheckpoint:
    """A checkpoint that is written when the learner says so."""

    def __init__(self, learner: ScriptedLearner, folder: Path) -> None:
        self._learner, self._folder = learner, folder

    @property
    def is_written(self) -> bool:
        return self._learner.is_fast

    def complete(self) -> CheckpointSeconds:
        if self._learner.error is not None:
            raise self._learner.error
        self._learner.checkpoints.append(self._folder.name)
        return CheckpointSeconds(held=0.5, writing=2.0)


@dataclass
class Run:
    """Holds a run's shared state and its hooks."""

    context: RunContext
    hooks: Hooks


@cache
def embedded_inputs() -> Inputs:
    """Read the embedded pair and its prompts once; what the runs here set besides changes nothing in them."""
    return load_inputs(embedded_config(["rollout.max_completion_tokens=40"]))


def make_run(directory: RunDirectory, config: Config, first_step: int = 0) -> tuple[Run, ScriptedLearner]:
    """Return a run of the embedded pair without pools and held-out prompts."""
    learner = ScriptedLearner()
    rollouts = SimpleNamespace(state=lambda: PoolState("rollout", ["rollout-0"], 2, 1), size=2)
    pipeline: Any = SimpleNamespace(
        learner=learner,
        rollouts=rollouts,
        teachers=ReplaceableTeachers({}, call_seconds=1),
        placement=SimpleNamespace(rollout=SimpleNamespace(gpus_per_worker=0)),
        start_seconds=1.0,
    )
    inputs = replace(embedded_inputs(), held_out_ids=())
    context = make_run_context(config, inputs, pipeline, directory, first_step)
    flow: Any = SimpleNamespace(take_spans=list)
    context.flow = flow
    return Run(context, Hooks(step_hooks(context))), learner


def end_with(run: Run, error: PreceptorError) -> None:
    with pytest.raises(type(error)), run.hooks.ending():
        raise error


def config_in(folder: Path, *overrides: str) -> Config:
    settings = ("rollout.max_completion_tokens=40", "rollout.max_staleness=1", "alarms.truncation.steps=2")
    no_rows = "logging.kept_rows=0"  # the learner has no ranks that keep any
    return embedded_config([f"run.directory={folder}", *settings, no_rows, *overrides])


def consume(run: Run, step: int) -> None:
    requests = [RolloutRequest(trajectory_id=step, prompt_id=0, sample_index=0, seed=1)]
    run.context.ledger.admit(step, requests)
    handle = BatchHandle(None, "main", (step,), (2,), (1,), (0,), min_policy_versions=(0,), max_policy_versions=(0,))
    run.context.ledger.watch(step, ReadyBatches([handle])).take()


def finish(run: Run, steps: range, truncated_ratio: float) -> None:
    for step in steps:
        consume(run, step)
        run.hooks.after_step(
            step, {**DEFAULTS, "step": step, "train/kl": 0.5, "rollout/truncated_ratio": truncated_ratio}, []
        )


def test_an_alarm_that_is_to_stop_the_run_leaves_a_checkpoint_and_says_why(tmp_path: Path) -> None:
    config = config_in(tmp_path, "alarms.truncation.action=stop")
    directory = RunDirectory.create(config)
    run, learner = make_run(directory, config)
    finish(run, range(1, 2), truncated_ratio=0.9)
    with pytest.raises(TrainingError, match=r"alarm truncation at step 2: .* is 0.9, above 0.5, .*action asks"):
        finish(run, range(2, 3), truncated_ratio=0.9)
    assert learner.checkpoints == ["step-2"]
    [noted] = [json.loads(line) for line in directory.alarms.read_text().splitlines()]
    assert (noted["alarm"], noted["step"], noted["action"]) == ("truncation", 2, "stop")


def test_an_alarm_that_shortens_lowers_the_cap_of_the_steps_that_are_not_under_way(tmp_path: Path) -> None:
    config = config_in(tmp_path, "alarms.truncation.action=shorten")
    run, _ = make_run(RunDirectory.create(config), config)
    finish(run, range(1, 3), truncated_ratio=0.9)
    assert [run.context.length_cap.at(step) for step in (2, 3, 4)] == [40, 30, 30]


def test_a_resumed_run_has_the_cap_of_the_steps_that_it_keeps(tmp_path: Path) -> None:
    config = config_in(tmp_path, "alarms.truncation.action=shorten")
    directory = RunDirectory.create(config)
    run, _ = make_run(directory, config)
    finish(run, range(1, 3), truncated_ratio=0.9)
    finish(run, range(3, 4), truncated_ratio=0.1)
    finish(run, range(4, 6), truncated_ratio=0.9)  # a second alarm, at a step that is done again
    resumed, _ = make_run(directory, config, first_step=3)
    assert [resumed.context.length_cap.at(step) for step in (3, 6, 9)] == [30, 30, 30]
    assert [json.loads(line)["step"] for line in directory.alarms.read_text().splitlines()] == [2]
    assert run.context.length_cap.at(6) == 22


def test_a_run_that_is_asked_to_stop_finishes_its_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run, learner = make_run(RunDirectory.create(config), config)
    finish(run, range(1, 2), truncated_ratio=0.0)
    run.context.stop.set()
    with pytest.raises(RunStopped, match=f"stopped after step 2; go on with preceptor train --resume {tmp_path}"):
        finish(run, range(2, 3), truncated_ratio=0.0)
    assert learner.checkpoints == ["step-2"]


def test_a_checkpoint_is_completed_beside_the_next_steps_and_its_cost_recorded(tmp_path: Path) -> None:
    config = config_in(tmp_path, "checkpoint.every_steps=2")
    directory = RunDirectory.create(config)
    run, learner = make_run(directory, config)
    learner.is_fast = False
    finish(run, range(1, 4), truncated_ratio=0.0)
    assert (learner.begun, learner.checkpoints) == (["step-2"], [])
    learner.is_fast = True
    finish(run, range(4, 5), truncated_ratio=0.0)
    assert (learner.begun, learner.checkpoints) == (["step-2", "step-4"], ["step-2"])
    records = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [record.get("checkpoint/held_seconds") for record in records] == [None, None, None, 0.5]
    assert records[3]["checkpoint/writing_seconds"] == 2.0


def test_a_checkpoint_begins_only_when_the_one_before_is_complete(tmp_path: Path) -> None:
    config = config_in(tmp_path, "checkpoint.every_steps=1")
    run, learner = make_run(RunDirectory.create(config), config)
    learner.is_fast = False
    finish(run, range(1, 4), truncated_ratio=0.0)
    assert (learner.begun, learner.checkpoints) == (["step-1", "step-2", "step-3"], ["step-1", "step-2"])


def test_the_last_checkpoint_is_complete_when_the_run_ends(tmp_path: Path) -> None:
    config = config_in(tmp_path, "run.steps=2")
    run, learner = make_run(RunDirectory.create(config), config)
    learner.is_fast = False
    finish(run, range(1, 3), truncated_ratio=0.0)
    assert learner.checkpoints == ["step-2"]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_at_the_next_steps_end(tmp_path: Path) -> None:
    config = config_in(tmp_path, "checkpoint.every_steps=2")
    run, learner = make_run(RunDirectory.create(config), config)
    learner.error = CheckpointError("checkpoint step-2: cannot write rank-0.safetensors: No space left on device")
    finish(run, range(1, 3), truncated_ratio=0.0)
    with pytest.raises(CheckpointError, match="No space left on device"):
        finish(run, range(3, 4), truncated_ratio=0.0)


@pytest.mark.parametrize(("num_steps", "expected"), [(2, ["step-2"]), (3, ["step-2", "step-3"])])
def test_another_error_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, num_steps: int, expected: list[str]
) -> None:
    config = config_in(tmp_path, "checkpoint.every_steps=2")
    run, learner = make_run(RunDirectory.create(config), config)
    finish(run, range(1, num_steps + 1), truncated_ratio=0.0)
    end_with(run, ActorDiedError("rollout-0 died"))
    assert learner.checkpoints == expected


def test_an_error_before_the_first_step_leaves_none(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run, learner = make_run(RunDirectory.create(config), config)
    end_with(run, ActorDiedError("rollout-0 died"))
    assert learner.checkpoints == []


def test_a_checkpoint_knows_the_ledger_and_what_was_in_flight(tmp_path: Path) -> None:
    config = config_in(tmp_path, "checkpoint.every_steps=2")
    directory = RunDirectory.create(config)
    run, learner = make_run(directory, config)
    finish(run, range(1, 2), truncated_ratio=0.0)
    consume(run, 3)
    finish(run, range(2, 3), truncated_ratio=0.0)
    state = learner.states[0]
    assert (state["step"], list(state["ledger"]["in_flight"])) == (2, [3])
    assert state["ledger"]["checksum"] == checksum([directory.ledger.read_bytes()])


def test_a_resumed_run_repeats_no_sample_and_no_record(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    directory = RunDirectory.create(config)
    run, _ = make_run(directory, config)
    for step, model in ((0, "teacher main"), (0, "student"), (2, "student"), (4, "student")):
        write_samples(directory.samples, step, model, [{"completion": "line\u2028break"}])
    finish(run, range(1, 5), truncated_ratio=0.0)
    make_run(directory, config, first_step=2)
    samples = [json.loads(line) for line in directory.samples.read_text().split("\n")[:-1]]
    assert [(sample["step"], sample["model"]) for sample in samples] == [
        (0, "teacher main"),
        (0, "student"),
        (2, "student"),
    ]
    for file in (directory.metrics, directory.ledger):
        assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    make_run(directory, config, first_step=0)  # the untrained student is measured again, its teacher is not
    assert [json.loads(line)["model"] for line in directory.samples.read_text().split("\n")[:-1]] == ["teacher main"]


def test_a_step_is_recorded_with_its_pools_and_everybody_is_told(tmp_path: Path) -> None:
    config = config_in(tmp_path, "run.steps=9", "logging.trace_steps=1")
    directory = RunDirectory.create(config)
    with KeptStatus(directory.status, config.run.steps):
        run, _ = make_run(directory, config)
        with run.hooks.ending():
            finish(run, range(1, 2), truncated_ratio=0.0)
        [record] = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
        assert (record["pool/rollout/serving"], record["pool/rollout/wanted"]) == (1, 2)
        assert 0 < record["pool/learner/busy_share"] <= 1
        report = read_report(directory.path)
    assert (report.state, report.step, [pool.name for pool in report.pools]) == ("running", 1, ["rollout", "learner"])
    assert "learner-0" in directory.trace.read_text()


def test_a_balanced_run_looks_at_every_step_but_the_last_and_a_resumed_one_forgets_later_moves(tmp_path: Path) -> None:
    config = config_in(tmp_path, "run.steps=3", "balance=auto")
    directory = RunDirectory.create(config)
    for step in (1, 2):
        RecordsFile(directory.moves).write({"step": step, "sentence": "s", "moved": True})
    run, _ = make_run(directory, config, first_step=1)
    finish(run, range(2, 4), truncated_ratio=0.0)
    assert [found["step"] for found in RecordsFile(directory.moves).read()] == [1]
    assert [found["balance/moves"] for found in RecordsFile(directory.metrics).read()] == [0.0, 0.0]


def test_files_that_are_not_wanted_are_not_written(tmp_path: Path) -> None:
    config = config_in(tmp_path, "run.steps=9", "logging.tensorboard=false", "logging.trace_steps=0")
    directory = RunDirectory.create(config)
    run, _ = make_run(directory, config)
    with run.hooks.ending():
        finish(run, range(1, 2), truncated_ratio=0.0)
    assert not directory.tensorboard.exists()
    assert not directory.trace.exists()
