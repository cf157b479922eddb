"""Who is asked when, and which of the replicas' answers end in a finding."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.actors.object_store import pack
from cluster.config.run_config import Config
from cluster.contracts.errors import ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated
from cluster.models.weight_files import fingerprint
from teacher_workers.audit.reference import load_reference
from teacher_workers.audit.runner import ScoreAudit, audit_request
from tests.builders import make_config, make_trajectory
from tests.teacher_workers.audit.staged_audits import ONE, TWO, ZERO, handles, right, start
from tests.teacher_workers.audited_actors import Stage, StagedPool

pytestmark = pytest.mark.timeout(120)


def test_right_replicas_pass_and_leave_a_reference(stage: Any, config: Config, tmp_path: Path) -> None:
    audit = start(config, right(stage, ZERO, ONE), tmp_path)
    assert len(audit.outstanding) == 4  # two halves of each replica's answer
    assert audit.finish() == []
    reference = load_reference(tmp_path / "main.arrow")
    assert reference is not None
    assert sorted(len(row) for row in reference.rows) == [14, 18, 22, 32]  # the four shortest of five
    assert [path.name for path in tmp_path.iterdir()] == ["main.arrow"]


def test_everybody_is_asked_again_every_so_many_steps_and_not_in_between(
    stage: Any, config: Config, tmp_path: Path
) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    assert not audit.is_due(50)  # one is under way
    audit.finish()
    assert [step for step in range(52) if audit.is_due(step)] == [50, 51]
    audit.begin(51)  # the audit before was still under way at 50
    audit.finish()
    assert [step for step in range(51, 102) if audit.is_due(step)] == [100, 101]


def test_every_teacher_is_asked_each_time(stage: Any, models: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(f"teachers.main.model={models['first']}", f"teachers.code.model={models['second']}")
    pools = {"main": right(stage, ZERO), "code": right(stage, "teacher-code-0")}
    audit = ScoreAudit(config, pools, tmp_path)
    audit.take_rows(handles())
    for step in (0, 50):
        audit.begin(step)
        assert len(audit.outstanding) == 4  # two halves of each teacher's answer
        assert audit.finish() == []
    pools["code"].engines["teacher-code-0"] = "Hot"
    audit.begin(100)
    with pytest.raises(ScoreError, match=r"^teacher code, replica teacher-code-0: "):
        audit.finish()


def test_every_steps_0_asks_at_the_start_only_and_rows_0_never(stage: Any, config: Config, tmp_path: Path) -> None:
    once = make_config(f"teachers.main.model={config.teachers['main'].model}", "score_audit.every_steps=0")
    audit = start(once, right(stage, ZERO), tmp_path)
    audit.finish()
    assert not any(audit.is_due(step) for step in range(200))
    never = make_config(f"teachers.main.model={config.teachers['main'].model}", "score_audit.rows=0")
    audit = ScoreAudit(never, {"main": right(stage, ZERO)}, tmp_path / "never")
    assert not audit.needs_rows
    assert not audit.is_due(0)


@pytest.mark.parametrize("engine", ["Nan", "Constant", "TooLate", "TooEarly", "Hot", "RightEngine:7"])
def test_the_one_wrong_replica_of_three_is_named_and_fenced(
    engine: str, stage: Any, config: Config, tmp_path: Path
) -> None:
    pool = StagedPool(stage, {ZERO: "RightEngine", ONE: engine, TWO: "RightEngine"})
    faults = start(config, pool, tmp_path).finish()
    assert [(fault.teacher, fault.replica) for fault in faults] == [("main", ONE)]
    assert pool.fenced == {ONE: faults[0].sentence}
    assert pool.serving() == {0: ZERO, 2: TWO}


def test_a_replica_that_goes_wrong_later_is_found_by_the_next_audit(stage: Any, config: Config, tmp_path: Path) -> None:
    pool = right(stage, ZERO, ONE)
    audit = start(config, pool, tmp_path)
    assert audit.finish() == []
    pool.engines[ZERO] = "Hot"
    audit.begin(50)
    [fault] = audit.finish()
    # Of two that differ, the reference tells which is right.
    assert (fault.replica, fault.kind) == (ZERO, "disagreeing")
    assert list(pool.fenced) == [ZERO]


def test_when_no_replica_can_be_trusted_the_run_ends_with_a_sentence(
    stage: Any, config: Config, tmp_path: Path
) -> None:
    pool = StagedPool(stage, {ZERO: "TooLate"})
    sentence = r"^teacher main, replica teacher-main-0: its .*no other replica of teacher main can be trusted$"
    with pytest.raises(ScoreError, match=sentence):
        start(config, pool, tmp_path).finish()
    assert not list(tmp_path.iterdir())  # a wrong answer is no reference


def test_a_replica_that_was_started_again_is_asked_at_once(stage: Any, config: Config, tmp_path: Path) -> None:
    pool = right(stage, ZERO, ONE)
    audit = start(config, pool, tmp_path)
    audit.finish()
    pool.engines.pop(ONE)
    pool.engines["teacher-main-1-again-1"] = "RightEngine:7"
    assert audit.is_due(3)
    audit.begin(3)
    assert len(audit.outstanding) == 2  # the other one is not asked
    [fault] = audit.finish()
    assert fault.replica == "teacher-main-1-again-1"
    assert pool.serving() == {0: ZERO}


def test_half_an_answer_is_not_judged(stage: Any, config: Config, tmp_path: Path) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    first, second = audit.outstanding
    ray.wait([first, second], num_returns=2, timeout=60)
    assert audit.collect([first]) == []
    assert audit.outstanding == [second]
    assert not (tmp_path / "main.arrow").exists()
    assert audit.collect([second]) == []
    assert audit.outstanding == []
    assert (tmp_path / "main.arrow").exists()


def test_a_late_replica_is_said_and_does_not_keep_the_others_from_being_judged(
    stage: Any, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    pool = StagedPool(stage, {ZERO: "silent", ONE: "TooLate", TWO: "RightEngine"})
    audit = start(config, pool, tmp_path, clock=lambda: now[0])
    ready, _ = ray.wait(audit.outstanding, num_returns=4, timeout=60)
    assert audit.collect(ready) == []
    now[0] = config.ray.call_timeout_seconds + 1
    assert [fault.replica for fault in audit.collect([])] == [ONE]
    assert list(pool.fenced) == [ONE]
    said = [record.getMessage() for record in caplog.records if record.name == "preceptor"]  # Ray may say more
    assert said[0] == "score_audit: no answer from teacher-main-0 in time; they are not checked"
    assert audit.outstanding == []


def test_a_replica_that_dies_while_it_is_asked_is_its_pools_matter(
    ray_cluster: None, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    doomed = ray.remote(Stage).options(num_cpus=0).remote()
    pool = StagedPool(doomed, {ZERO: "dying"})
    assert start(config, pool, tmp_path).finish() == []
    assert pool.fenced == {}
    # Ray itself may report the half that nobody reads.
    [message] = [record.getMessage() for record in caplog.records if record.name == "preceptor"]
    assert message.startswith("score_audit: while waiting for audited scores from teacher-main-0: ")


def test_batches_of_rows_too_short_are_passed_over_where_there_are_others(
    stage: Any, config: Config, tmp_path: Path
) -> None:
    wire, handle = pack(make_generated([make_trajectory([1], [2])]), {})
    audit = ScoreAudit(config, {"main": right(stage, ZERO)}, tmp_path)
    audit.take_rows([replace(handle, reference=ray.put(wire))] * 9 + handles())
    assert audit.is_due(0)


def test_rows_too_short_to_audit_with_are_said(
    stage: Any, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    audit = ScoreAudit(config, {"main": right(stage, ZERO)}, tmp_path)
    wire, handle = pack(make_generated([make_trajectory([1], [2])]), {})
    audit.take_rows([replace(handle, reference=ray.put(wire))])
    assert "their scores are not audited" in caplog.messages[0]
    assert not audit.is_due(0)


def test_weights_of_the_same_shapes_have_another_fingerprint(models: dict[str, Path]) -> None:
    first, second = (models[name] / "model.safetensors" for name in ("first", "second"))
    assert first.stat().st_size == second.stat().st_size
    assert fingerprint(str(models["first"])) != fingerprint(str(models["second"]))
    assert fingerprint(str(models["first"])) == fingerprint(str(models["first"]))


@pytest.mark.parametrize(
    ("objective", "request_"),
    [
        ("thinking-machines", ScoreRequest("teacher", entropy=True)),
        ("tail-topk", ScoreRequest("teacher", top_k=16, entropy=True)),
        ("exact-reverse-kl", ScoreRequest("teacher", entropy=True, hidden=True)),
        ("rethinking", ScoreRequest("teacher", given_candidates=True, entropy=True)),
    ],
)
def test_an_audit_asks_for_what_the_objective_asks_for_and_the_entropy(objective: str, request_: ScoreRequest) -> None:
    assert audit_request(make_config(f"objective={objective}"), "main") == request_


@pytest.fixture
def refreshed(models: dict[str, Path]) -> Config:
    model = models["first"]
    return make_config(
        f"student.model={model}",
        f"teachers.main.model={model}",
        "teachers.main.from=student",
        "teachers.main.refresh=live",
        "objective=thinking-machines",
    )


def test_a_teacher_that_follows_the_student_is_not_held_against_its_first_answers(
    stage: Any, refreshed: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = right(stage, ZERO, ONE)
    audit = start(refreshed, pool, tmp_path)
    assert audit.finish() == []
    pool.engines |= {ZERO: "RightEngine:7@50", ONE: "RightEngine:7@50"}
    audit.begin(50)
    assert audit.finish() == []
    assert not (tmp_path / "main.arrow").exists()
    assert "teacher main follows the student; audits compare its replicas" in caplog.text
    pool.engines |= {ZERO: "RightEngine:8@100", ONE: "RightEngine:9@100"}
    audit.begin(100)
    with pytest.raises(ScoreError, match="score the same rows differently"):
        audit.finish()


def test_answers_of_two_versions_are_not_compared(stage: Any, refreshed: Config, tmp_path: Path) -> None:
    pool = StagedPool(stage, {ZERO: "RightEngine:7@2", ONE: "RightEngine@1", TWO: "RightEngine:7@2"})
    assert start(refreshed, pool, tmp_path).finish() == []
    pool.engines[ZERO] = "RightEngine:8@3"  # it alone is the newest
    audit = start(refreshed, pool, tmp_path)
    assert audit.finish() == []
