"""What answers are held against: the first ones, those of a teacher that takes over, and those of a resumed run."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config.run_config import Config
from cluster.contracts.errors import CheckpointError, ScoreError
from teacher_workers.audit.reference import load_reference
from teacher_workers.audit.runner import ScoreAudit
from tests.builders import make_config
from tests.teacher_workers.audit.staged_audits import ZERO, right, start
from tests.teacher_workers.audited_actors import StagedPool
from tests.tiny_qwen3 import write_tiny_qwen3

pytestmark = pytest.mark.timeout(120)

NEW = "teacher-main@new-0"


def test_a_replacement_that_was_asked_for_is_no_finding_and_gets_a_reference_of_its_own(
    stage: Any, config: Config, models: dict[str, Path], tmp_path: Path
) -> None:
    audit = start(config, right(stage, ZERO), tmp_path)
    audit.finish()
    replaced = make_config(f"teachers.main.model={models['second']}", "objective=thinking-machines")
    pool = StagedPool(stage, {NEW: "RightEngine:7"})
    replacement = audit.for_replacement(replaced, {"main": pool})
    replacement.begin(10)
    assert replacement.finish() == []
    audit.adopt(replacement)
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
    replacement = audit.for_replacement(replaced, {"main": StagedPool(stage, {NEW: "Nan"})})
    replacement.begin(10)
    with pytest.raises(ScoreError, match=f"replica {NEW}: "):
        replacement.finish()
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
    replacement = audit.for_replacement(replaced, {"main": pool})
    replacement.begin(10)
    assert replacement.finish() == []
    audit.adopt(replacement)
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


def test_a_damaged_reference_is_a_sentence(stage: Any, config: Config, tmp_path: Path) -> None:
    (tmp_path / "main.arrow").write_bytes(b"ARROW1 and then nothing")
    with pytest.raises(CheckpointError, match=r"main\.arrow: cannot be read .* delete it to take a new reference"):
        ScoreAudit(config, {"main": right(stage, ZERO)}, tmp_path)
