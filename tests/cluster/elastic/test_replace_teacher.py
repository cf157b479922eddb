"""Teachers are replaced while a run goes on; on workers that only write down what is asked of them."""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cluster.actors.cluster import PoolTimeouts
from cluster.cli import main
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ActorError, ScoreError
from cluster.demo import EMBEDDED, embedded_config
from cluster.elastic.control_files import CHECK_SECONDS, read_message
from cluster.elastic.replace_teacher import ReplaceResponse, TeacherChanges, current_config, replacing_sections
from cluster.models.weight_files import fingerprint
from cluster.run.inputs import Inputs, load_inputs
from teacher_workers.pool import TeacherPool
from teacher_workers.replacement import ReplaceableTeachers, Replacement
from tests.builders import make_config
from tests.cluster.run.contexts import make_run_context
from tests.tiny_qwen3 import write_tiny_qwen3

TEACHER, STUDENT = str(EMBEDDED / "teacher"), str(EMBEDDED / "student")
NAME = "countdown"  # of the demo's teacher


@dataclass
class Workers:
    """Stands for TeacherReplicas."""

    teachers: Mapping[str, TeacherConfig]
    size: int = 1
    serves: bool = True
    has_ended: bool = False

    @property
    def serving(self) -> list[int]:
        return list(range(self.size)) if self.serves else []

    def resize(self, size: int) -> None:
        self.size = size

    def end(self) -> None:
        self.has_ended = True


class Audit:
    """Audits whose replacement say what a test wants."""

    def __init__(self) -> None:
        self.error: ScoreError | None = None
        self.audited: list[dict[str, str]] = []
        self.num_taken_over = 0

    def for_replacement(self, config: Config, pools: Mapping[str, TeacherPool]) -> "Audit":
        self.audited.append({name: config.teachers[name].model for name in pools})
        return self

    def begin(self, step: int) -> None:
        """Ask nobody."""

    def finish(self) -> list[Any]:
        if self.error is not None:
            raise self.error
        return []

    def adopt(self, for_replacement: "Audit") -> None:
        self.num_taken_over += 1


class Run:
    """A run of the embedded pair up to its pools."""

    def __init__(self, folder: Path, inputs: Inputs, size: int = 1) -> None:
        self.config = embedded_config([f"run.directory={folder}", "run.name=r"])
        self.directory = RunDirectory.create(self.config)
        self.inputs = inputs
        self.lack: str | None = None
        self.moment = 0.0
        self.said: list[str] = []
        self.heads: list[tuple[str, int]] = []
        self.audit = Audit()
        self.started: list[Workers] = []
        pool = self.pool(self.config, Workers(self.config.teachers, size))
        learner = SimpleNamespace(
            replace_teachers=lambda teachers, first_step: self.heads.append((teachers[NAME].model, first_step))
        )
        self.teachers = ReplaceableTeachers({NAME: pool}, call_seconds=1)
        self.pipeline: Any = SimpleNamespace(
            teachers=self.teachers, learner=learner, placement=SimpleNamespace(teachers={NAME: None})
        )
        self.open(first_step=0)

    def open(self, first_step: int) -> None:
        audit: Any = self.audit
        run = make_run_context(self.config, self.inputs, self.pipeline, self.directory, first_step)
        run.view = SimpleNamespace(say=self.said.append)  # type: ignore[assignment]
        self.changes = TeacherChanges(run, audit, self.start, lambda change: self.lack, self.tick)

    def tick(self) -> float:
        """Let a look be due each time that the clock is read."""
        self.moment += CHECK_SECONDS
        return self.moment

    def pool(self, config: Config, workers: Any) -> TeacherPool:
        return TeacherPool(NAME, workers, PoolTimeouts(1, 1), fingerprint(config.teachers[NAME].model))

    def start(self, config: Config, inputs: Inputs, pipeline: Any, name: str) -> Replacement:
        self.started.append(Workers(config.teachers, self.workers.size, serves=False))
        return Replacement({name: self.pool(config, self.started[-1])})

    @property
    def workers(self) -> Any:
        return self.teachers.pools[NAME].replicas

    def ask(self, model: str, name: str = NAME) -> ReplaceResponse:
        """Wish for a model, look, and return the answer."""
        request = {"request_id": str(len(self.said)), "teacher": name, "model": model}
        self.directory.replacing.request.write_text(json.dumps(request))
        self.changes.while_waiting()
        answer = read_message(self.directory.replacing.answer, ReplaceResponse)
        assert answer is not None
        assert answer.request_id == request["request_id"]
        return answer

    def enter(self, step: int) -> str:
        """Ask for a step, and return who scores it."""
        self.changes.before_step(step)
        return self.teachers._pool(NAME, step).teacher.model

    def versions(self) -> list[tuple[int, str]]:
        lines = [json.loads(line) for line in self.directory.teachers.read_text().splitlines()]
        assert all(line["fingerprint"] == fingerprint(line["model"]) for line in lines)
        return [(line["step"], line["model"]) for line in lines]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return load_inputs(embedded_config([]))


@pytest.fixture
def run(tmp_path: Path, inputs: Inputs) -> Run:
    return Run(tmp_path, inputs)


def test_a_new_checkpoint_takes_over_at_the_first_step_after_it_serves(run: Run) -> None:
    answer = run.ask(STUDENT)
    assert answer.is_granted
    assert answer.sentence == (
        f"teacher {NAME}: {STUDENT} starts, and scores from the first step that is asked for when it serves"
    )
    assert [run.enter(4), run.enter(5)] == [TEACHER, TEACHER]
    run.started[0].serves = True
    assert run.enter(6) == STUDENT
    assert run.teachers._pool(NAME, 5).teacher.model == TEACHER
    assert run.said[-1] == f"teacher {NAME} is {STUDENT} from step 7 on"
    assert run.versions() == [(1, TEACHER), (7, STUDENT)]
    assert run.audit.audited == [{NAME: STUDENT}]
    assert (run.audit.num_taken_over, run.heads) == (1, [(STUDENT, 6)])
    assert current_config(run.config, run.pipeline).teachers[NAME].model == STUDENT


def test_without_room_one_of_several_workers_makes_place_for_the_first_new_one(tmp_path: Path, inputs: Inputs) -> None:
    run = Run(tmp_path, inputs, size=3)
    run.lack = "1 more workers need 1 GPUs, and 0 of the cluster's 4 are free"
    assert "0 of the cluster's 4 are free, so one worker leaves for the first of" in run.ask(STUDENT).sentence
    assert (run.workers.size, run.started[0].size) == (2, 3)
    assert run.enter(2) == TEACHER
    run.started[0].serves = True
    assert run.enter(3) == STUDENT


def test_without_room_beside_a_single_worker_the_new_one_takes_its_place_at_once(run: Run) -> None:
    run.lack = "1 more workers need 1 GPUs, and 0 of the cluster's 4 are free"
    assert "takes its place at the next step, whose scores wait for it" in run.ask(STUDENT).sentence
    old = run.workers
    assert run.enter(3) == STUDENT
    assert old.size == 1
    run.teachers.close(next_step=3)
    assert old.size == 0


def test_one_that_cannot_start_changes_nothing_and_is_told(tmp_path: Path, inputs: Inputs) -> None:
    run = Run(tmp_path, inputs, size=2)
    run.lack = "no room"
    run.ask(STUDENT)
    run.teachers.replacements[0].error = ActorError("vLLM cannot serve it")
    assert run.enter(3) == TEACHER
    run.changes.while_waiting()
    assert run.said[-1] == f"teacher {NAME} stays as it is: vLLM cannot serve it"
    assert (run.started[0].has_ended, run.workers.size) == (True, 2)
    assert run.ask(STUDENT).is_granted  # it may be tried again


def test_one_that_finds_no_place_in_time_is_given_up_and_may_be_tried_again(tmp_path: Path, inputs: Inputs) -> None:
    run = Run(tmp_path, inputs, size=2)
    run.lack = "no room"
    run.ask(STUDENT)
    run.moment += run.config.ray.start_timeout_seconds - 10
    run.changes.while_waiting()
    assert run.workers.size == 1
    run.moment += 10
    run.changes.while_waiting()
    assert run.said[-1].startswith(f"teacher {NAME} stays as it is: none of the new workers served within 600 s; ")
    assert (run.started[0].has_ended, run.workers.size) == (True, 2)
    assert run.ask(STUDENT).is_granted


def test_new_workers_on_a_gpu_that_all_share_are_given_the_part_of_the_old_ones() -> None:
    config = make_config("ray.share_gpu=true", "teachers.main.num_workers=2", "learner.gpu_memory_fraction=0.35")
    pipeline: Any = SimpleNamespace(placement=SimpleNamespace(on_gpu=True))
    found = replacing_sections(config, pipeline, Workers(config.teachers, size=3))["main"]  # type: ignore[arg-type]
    assert found.num_workers == 3
    # A rollout worker and two of the teacher share what the learner and 0.05 for processes leave.
    assert found.engine.gpu_memory_fraction == pytest.approx(0.2)


def test_one_whose_scores_cannot_be_trusted_does_not_take_over(run: Run) -> None:
    run.ask(STUDENT)
    run.started[0].serves = True
    run.audit.error = ScoreError("teacher countdown, replica 0: every token got the same score")
    assert run.enter(3) == TEACHER
    assert run.said[-1].startswith(f"teacher {NAME} stays as it is: teacher countdown, replica 0: every token")
    assert run.started[0].has_ended
    assert run.versions() == [(1, TEACHER)]


def test_a_drained_teacher_is_replaced_without_starting_anything(tmp_path: Path, inputs: Inputs) -> None:
    run = Run(tmp_path, inputs, size=0)
    assert run.ask(STUDENT).sentence.endswith("takes its place at the next step, and has no worker yet either")
    assert run.enter(1) == STUDENT


def refusal(run: Run, model: str, name: str = NAME) -> str:
    answer = run.ask(model, name)
    assert not answer.is_granted
    assert not run.started
    assert "\n" not in answer.sentence
    return answer.sentence


def test_what_cannot_be_a_teacher_of_the_run_is_refused_in_one_sentence(run: Run, tmp_path: Path) -> None:
    assert refusal(run, STUDENT, "math").startswith("there is no teacher 'math'; this run has countdown, and its")
    assert refusal(run, TEACHER) == f"teacher {NAME} is {TEACHER} already, with these very files"
    assert refusal(run, str(tmp_path / "absent")).endswith(
        "no such directory; give a Hugging Face directory or a hub id"
    )
    other = str(write_tiny_qwen3(tmp_path / "other"))
    assert refusal(run, other).startswith(f"teachers.{NAME}: its tokenizer is not the student's: ")


def test_the_student_itself_is_not_replaced(run: Run) -> None:
    teachers = {NAME: msgspec.structs.replace(run.config.teachers[NAME], source="student", model=STUDENT)}
    run.config, run.workers.teachers = msgspec.structs.replace(run.config, teachers=teachers), teachers
    run.open(first_step=0)
    assert (
        refusal(run, TEACHER)
        == f"teacher {NAME} is the student itself (from = 'student'), which no other model replaces"
    )


def test_a_checkpoint_whose_context_is_too_short_or_whose_weights_are_missing_is_refused(
    run: Run, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(STUDENT).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    run.inputs = replace(run.inputs, max_model_len=129)
    run.open(first_step=0)
    assert refusal(run, str(copy)) == f"model '{copy}': its context is 128 tokens, and this run needs 129"
    (copy / "model.safetensors").unlink()
    assert "safetensors" in refusal(run, str(copy))


def test_a_second_replacement_waits_for_the_first(run: Run) -> None:
    run.ask(STUDENT)
    answer = run.ask(STUDENT)
    assert (answer.is_granted, len(run.started)) == (False, 1)
    assert answer.sentence == f"teacher {NAME} is being replaced already; wait until the new one has taken over"


def test_a_resumed_run_does_not_grant_an_old_request_again(run: Run) -> None:
    run.ask(STUDENT)
    run.open(first_step=0)
    run.changes.while_waiting()
    assert len(run.started) == 1


def test_the_command_says_what_the_driver_answers(run: Run, capsys: Any) -> None:
    arguments = ["teacher", str(run.directory.path), "replace", NAME, STUDENT]
    over = threading.Event()

    def drive() -> None:
        while not over.wait(0.01):
            run.changes.while_waiting()

    driver = threading.Thread(target=drive)
    driver.start()
    try:
        assert main(arguments) == 0
        assert capsys.readouterr().out.startswith(f"teacher {NAME}: {STUDENT} starts")
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith(f"preceptor: teacher {NAME} is being replaced already")
    finally:
        over.set()
        driver.join()
