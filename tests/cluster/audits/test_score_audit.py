"""Audits of replicas that run real teacher workers in an actor, on engines that are right or wrong."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.audits.audited_teacher import audit_request
from cluster.audits.score_audit import ScoreAudit
from cluster.contracts.config import Config
from cluster.contracts.errors import CheckpointError, ScoreError
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.trajectory import make_generated
from cluster.workers.batch_store import pack
from teacher_workers.reference import fingerprint, load_reference
from tests.builders import make_config, make_trajectory
from tests.teacher_workers.audited_actors import Stage, StagedPool
from tests.tiny_qwen3 import write_tiny_qwen3

pytestmark = pytest.mark.timeout(120)

ZERO, ONE, TWO = "teacher-main-0", "teacher-main-1", "teacher-main-2"


@pytest.fixture(scope="module")
def stage(ray_cluster: None) -> Any:
    return ray.remote(Stage).options(num_cpus=0).remote()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_qwen3(folder / name, seed) for seed, name in enumerate(("first", "second"))}


@pytest.fixture
def config(models: dict[str, Path]) -> Config:
    return make_config(f"teachers.main.model={models['first']}", "objective=thinking-machines")


def handles() -> list[BatchHandle]:
    draw = np.random.default_rng(0)
    found = []
    for length in (40, 12, 20, 16, 30):
        row = make_trajectory((1, 2), draw.integers(4, 112, length))
        wire, handle = pack(make_generated([row]), {})
        found.append(replace(handle, reference=ray.put(wire)))
    return found


def start(config: Config, pool: StagedPool, folder: Path, step: int = 0, **options: Any) -> ScoreAudit:
    """Begin the first audit."""
    audit = ScoreAudit(config, {"main": pool}, folder, **options)
    if audit.needs_rows:
        audit.take_rows(handles())
    assert audit.is_due(step)
    audit.begin(step)
    return audit


def right(stage: Any, *names: str) -> StagedPool:
    return StagedPool(stage, dict.fromkeys(names, "RightEngine"))


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
    findings = start(config, pool, tmp_path).finish()
    assert [(finding.teacher, finding.replica) for finding in findings] == [("main", ONE)]
    assert pool.fenced == {ONE: findings[0].sentence}
    assert pool.serving() == {0: ZERO, 2: TWO}


def test_a_replica_that_goes_wrong_later_is_found_by_the_next_audit(stage: Any, config: Config, tmp_path: Path) -> None:
    pool = right(stage, ZERO, ONE)
    audit = start(config, pool, tmp_path)
    assert audit.finish() == []
    pool.engines[ZERO] = "Hot"
    audit.begin(50)
    [finding] = audit.finish()
    # Of two that differ, the reference tells which is right.
    assert (finding.replica, finding.kind) == (ZERO, "disagreeing")
    assert list(pool.fenced) == [ZERO]


def test_when_no_replica_can_be_trusted_the_run_ends_with_a_sentence(
    stage: Any, config: Config, tmp_path: Path
) -> None:
    pool = StagedPool(stage, {ZERO: "TooLate"})
    sentence = r"^teacher main, replica teacher-main-0: its .*no other replica of teacher main can be trusted$"
    with pytest.raises(ScoreError, match=sentence):
        start(config, pool, tmp_path).finish()
    assert not list(tmp_path.iterdir())  # a wrong answer is no reference


NEW = "teacher-main@new-0"


def test_a_replacement_that_was_asked_for_is_no_finding_and_gets_a_reference_of_its_own(
    stage: Any, config: Config, models: dict[str, Path], tmp_path: Path
) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    audit.finish()
    replaced = make_config(f"teachers.main.model={models['second']}", "objective=thinking-machines")
    pool = StagedPool(stage, {NEW: "RightEngine:7"})
    successors = audit.of_successors(replaced, {"main": pool})
    successors.begin(10)
    assert successors.finish() == []
    audit.take_over(successors)
    reference = load_reference(tmp_path / "main.arrow")
    assert reference is not None
    assert reference.origin.model == str(models["second"])
    audit.begin(50)
    assert audit.finish() == []
    pool.engines[NEW] = "RightEngine"  # the old weights behind the new teacher's name: nobody asked for that
    audit.begin(100)
    with pytest.raises(ScoreError, match=f"replica {NEW}: "):
        audit.finish()


def test_a_successor_that_fails_its_audit_leaves_the_reference_as_it_was(
    stage: Any, config: Config, models: dict[str, Path], tmp_path: Path
) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    audit.finish()
    replaced = make_config(f"teachers.main.model={models['second']}", "objective=thinking-machines")
    successors = audit.of_successors(replaced, {"main": StagedPool(stage, {NEW: "Nan"})})
    successors.begin(10)
    with pytest.raises(ScoreError, match=f"replica {NEW}: "):
        successors.finish()
    reference = load_reference(tmp_path / "main.arrow")
    assert reference is not None
    assert reference.origin.model == str(models["first"])
    audit.begin(50)
    assert audit.finish() == []


def test_a_successor_that_does_not_serve_yet_is_audited_when_it_does(
    stage: Any, config: Config, models: dict[str, Path], tmp_path: Path
) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    audit.finish()
    replaced = make_config(f"teachers.main.model={models['second']}", "objective=thinking-machines")
    pool = StagedPool(stage, {})
    successors = audit.of_successors(replaced, {"main": pool})
    successors.begin(10)
    assert successors.finish() == []
    audit.take_over(successors)
    assert not (tmp_path / "main.arrow").exists()  # a run that is resumed now knows nothing of the new one
    assert not audit.is_due(11)
    pool.engines[NEW] = "RightEngine:7"
    assert audit.is_due(12)
    audit.begin(12)
    assert audit.finish() == []
    assert load_reference(tmp_path / "main.arrow") is not None


def test_a_resumed_run_holds_its_teacher_against_the_first_answers(
    stage: Any, config: Config, models: dict[str, Path], tmp_path: Path
) -> None:
    start(config, right(stage, ZERO), tmp_path).finish()
    resumed = ScoreAudit(config, {"main": right(stage, ZERO)}, tmp_path)
    assert not resumed.needs_rows
    resumed.begin(70)
    assert resumed.finish() == []
    other = StagedPool(stage, {ZERO: "RightEngine:7"})
    with pytest.raises(ScoreError, match=r"not the teacher that the run began with; the files of .* are the same now"):
        start(config, other, tmp_path, step=70).finish()


def test_files_that_were_replaced_under_the_same_name_are_mentioned(
    stage: Any, models: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(f"teachers.main.model={write_tiny_qwen3(tmp_path / 'model', seed=0)}")
    start(config, right(stage, ZERO), tmp_path).finish()
    write_tiny_qwen3(tmp_path / "model", seed=1)
    with pytest.raises(ScoreError, match=r"the files of .*model are others now; .* or delete .*main\.arrow"):
        start(config, StagedPool(stage, {ZERO: "RightEngine:7"}), tmp_path).finish()


def test_another_teacher_in_the_run_file_begins_a_new_reference_and_says_so(
    stage: Any, config: Config, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start(config, right(stage, ZERO), tmp_path).finish()
    changed = make_config(f"teachers.main.model={models['second']}", "objective=thinking-machines")
    audit = start(changed, StagedPool(stage, {ZERO: "RightEngine:7"}), tmp_path)
    assert audit.finish() == []
    assert caplog.messages == [
        f"teacher main was {models['first']} in bfloat16; its scores are held against new ones from now on"
    ]
    kept = load_reference(tmp_path / "main.arrow")
    assert kept is not None
    assert kept.origin.model == str(models["second"])


def test_another_objective_is_audited_against_the_same_scores(stage: Any, config: Config, tmp_path: Path) -> None:
    start(config, right(stage, ZERO), tmp_path).finish()
    topk = make_config(f"teachers.main.model={config.teachers['main'].model}", "objective=tail-topk")
    assert start(topk, right(stage, ZERO), tmp_path).finish() == []
    with pytest.raises(ScoreError, match="not the teacher that the run began with"):
        start(topk, StagedPool(stage, {ZERO: "RightEngine:7"}), tmp_path).finish()


def test_a_replica_that_was_started_again_is_asked_at_once(stage: Any, config: Config, tmp_path: Path) -> None:
    pool = right(stage, ZERO, ONE)
    audit = start(config, pool, tmp_path)
    audit.finish()
    pool.engines.pop(ONE)
    pool.engines["teacher-main-1-again-1"] = "RightEngine:7"
    assert audit.is_due(3)
    audit.begin(3)
    assert len(audit.outstanding) == 2  # the other one is not asked
    [finding] = audit.finish()
    assert finding.replica == "teacher-main-1-again-1"
    assert pool.serving() == {0: ZERO}


def test_half_an_answer_is_not_judged(stage: Any, config: Config, tmp_path: Path) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    first, second = audit.outstanding
    ray.wait([first, second], num_returns=2, timeout=60)
    assert audit.look([first]) == []
    assert audit.outstanding == [second]
    assert not (tmp_path / "main.arrow").exists()
    assert audit.look([second]) == []
    assert audit.outstanding == []
    assert (tmp_path / "main.arrow").exists()


def test_a_late_replica_is_said_and_does_not_keep_the_others_from_being_judged(
    stage: Any, config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    pool = StagedPool(stage, {ZERO: "silent", ONE: "TooLate", TWO: "RightEngine"})
    audit = start(config, pool, tmp_path, clock=lambda: now[0])
    ready, _ = ray.wait(audit.outstanding, num_returns=4, timeout=60)
    assert audit.look(ready) == []
    now[0] = config.ray.call_timeout_seconds + 1
    assert [finding.replica for finding in audit.look([])] == [ONE]
    assert list(pool.fenced) == [ONE]
    assert caplog.messages[0] == "score_audit: no answer from teacher-main-0 in time; they are not judged"
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


def test_a_damaged_reference_is_a_sentence(stage: Any, config: Config, tmp_path: Path) -> None:
    (tmp_path / "main.arrow").write_bytes(b"ARROW1 and then nothing")
    with pytest.raises(CheckpointError, match=r"main\.arrow: cannot be read .* delete it to take a new reference"):
        ScoreAudit(config, {"main": right(stage, ZERO)}, tmp_path)


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
