"""When teachers that are the student take its weights; on a learner that writes down what it is asked for."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import parse_run_config
from cluster.contracts.errors import ConfigError
from cluster.run.hooks import RunContext, TeacherState
from cluster.run.inputs import Inputs
from cluster.run.self_teachers import SelfTeachers, TeacherGates
from rollout_workers.prompts import PromptOrder, PromptSet
from tests.builders import MINIMAL_RUN
from tests.cluster.run.contexts import make_run_context

INPUTS = Inputs(PromptSet.of_token_ids([[1]], "main"), PromptOrder(1, 0, True), held_out_ids=(0,), max_model_len=8)


class Learner:
    """Stands for a LearnerGroup."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, list[str], int, bool]] = []
        self.brought: list[tuple[str, str]] = []

    def refresh_teacher(self, name: str, workers: list[str], version: int, takes_weights: bool) -> Any:
        self.sent.append((name, workers, version, takes_weights))
        return SimpleNamespace(num_bytes=10)

    def bring_teacher(self, name: str, worker: str) -> str:
        self.brought.append((name, worker))
        return "reference"


class Replicas:
    """Stands for the replicas of a pool."""

    def __init__(self, name: str) -> None:
        self.prepared = [f"{name}-0", f"{name}-1"]
        self.prepare: Any = None

    def prepare_with(self, prepare: Any) -> None:
        self.prepare = prepare


def make_run(folder: Path, first_step: int = 0, **refreshes: str) -> tuple[RunContext, Learner]:
    text = MINIMAL_RUN.replace('[teachers.main]\nmodel = "teacher"\n', "")
    text += "".join(
        f'[teachers.{name}]\nfrom = "student"\nrefresh = {refresh}\n' for name, refresh in refreshes.items()
    )
    overrides = ["prompts.held_out=held_out.jsonl", "evaluation.every_steps=1", f"run.directory={folder}"]
    config = parse_run_config(text, overrides)
    pools = {name: SimpleNamespace(replicas=Replicas(name)) for name in refreshes}
    learner = Learner()
    pipeline: Any = SimpleNamespace(learner=learner, teachers=SimpleNamespace(pools=pools))
    return make_run_context(config, INPUTS, pipeline, RunDirectory.create(config), first_step), learner


def test_each_teacher_takes_weights_when_its_refresh_says(tmp_path: Path) -> None:
    run, learner = make_run(tmp_path, cold='"frozen"', live='"live"', two="{ every = 2 }", mean="{ ema = 0.1 }")
    teachers = SelfTeachers(run)
    teachers.begin()
    assert [sent[0] for sent in learner.sent] == ["live", "two", "mean"]
    assert {sent[2:] for sent in learner.sent} == {(0, False)}  # what they have, which the student may have left
    learner.sent.clear()
    records = [teachers.after(step) for step in (1, 2)]
    assert learner.sent == [
        (name, [f"{name}-0", f"{name}-1"], version, True)
        for version, names in ((1, ("live", "mean")), (2, ("live", "two", "mean")))
        for name in names
    ]
    assert [record["refresh/bytes"] for record in records] == [20, 30]
    assert run.teacher_states == {name: TeacherState(2) for name in ("live", "two", "mean")}


def test_a_worker_that_comes_later_waits_for_the_weights_of_its_teacher(tmp_path: Path) -> None:
    run, learner = make_run(tmp_path, live='"live"', two="{ every = 2 }")
    SelfTeachers(run).begin()
    pools: Any = run.pipeline.teachers.pools
    assert pools["two"].replicas.prepare("two-1-again-1") == ["reference"]
    assert learner.brought == [("two", "two-1-again-1")]


def test_a_resumed_run_brings_back_the_versions_of_its_checkpoint(tmp_path: Path) -> None:
    run, learner = make_run(tmp_path, first_step=3, two="{ every = 2 }", mean="{ ema = 0.1 }")
    run.teacher_states = {"two": TeacherState(2), "mean": TeacherState(3)}
    SelfTeachers(run).begin()
    assert [(name, version, takes) for name, _, version, takes in learner.sent] == [
        ("two", 2, False),
        ("mean", 3, False),
    ]


def gates(run: RunContext, **latest: float) -> TeacherGates:
    evaluations: Any = SimpleNamespace(latest={f"held_out/{name}": value for name, value in latest.items()})
    hook = TeacherGates(run, evaluations)
    hook.begin()
    return hook


def test_a_gate_opens_when_its_metric_is_better_than_ever(tmp_path: Path) -> None:
    run, learner = make_run(
        tmp_path, up='{ gate = "held_out/accuracy" }', down='{ gate = "held_out/kl", better = "lower" }'
    )
    SelfTeachers(run).begin()
    learner.sent.clear()
    hook = gates(run, accuracy=0.5, kl=1.0)
    for step, (accuracy, kl) in enumerate([(0.4, 1.0), (0.6, 0.9), (0.6, 0.95), (0.7, 0.8)], start=1):
        assert SelfTeachers(run).after(step) == {}  # no refresh by steps
        hook.after_step(step, {"held_out/accuracy": accuracy, "held_out/kl": kl}, [])
        hook.after_step(step, {}, [])  # a step without an evaluation
    assert [(name, version) for name, _, version, _ in learner.sent] == [("up", 2), ("down", 2), ("up", 4), ("down", 4)]
    assert run.teacher_states == {"up": TeacherState(4, 0.7), "down": TeacherState(4, 0.8)}


def test_a_gate_of_a_resumed_run_knows_its_best(tmp_path: Path) -> None:
    run, learner = make_run(tmp_path, first_step=5, up='{ gate = "held_out/accuracy" }')
    run.teacher_states = {"up": TeacherState(2, 0.6)}
    hook = gates(run)
    assert hook.after_step(6, {"held_out/accuracy": 0.55}, []) == {}
    assert learner.sent == []


def test_a_gate_of_no_metric_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run, _ = make_run(tmp_path, up='{ gate = "held_out/speed" }')
    with pytest.raises(
        ConfigError, match=r"gate is 'held_out/speed', and evaluations have held_out/accuracy, held_out/kl"
    ):
        gates(run, accuracy=0.5, kl=1.0)
