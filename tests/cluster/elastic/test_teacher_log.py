from pathlib import Path

import pytest

from cluster.config.run_config import Config
from cluster.contracts.errors import CheckpointError
from cluster.elastic.teacher_log import TeacherLog, TeacherVersion, in_force, latest_versions, read_versions
from tests.builders import make_config

FIRST = TeacherVersion(1, "main", "teacher", "f1")
SECOND = TeacherVersion(6, "main", "better", "f2", by="replacement")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A run whose teacher was replaced before step 6."""
    log = TeacherLog(tmp_path / "teachers.jsonl", first_step=0)
    log.note(FIRST)
    log.note(SECOND)
    return tmp_path / "teachers.jsonl"


def test_the_latest_checkpoint_is_the_one_in_force(path: Path) -> None:
    assert read_versions(path) == [FIRST, SECOND]
    assert latest_versions(path) == {"main": SECOND}


def test_what_is_known_is_not_written_again(path: Path) -> None:
    TeacherLog(path, first_step=8).note(TeacherVersion(9, "main", "better", "f2"))  # as the resumed run begins
    assert read_versions(path) == [FIRST, SECOND]


def test_a_run_that_goes_back_behind_a_replacement_keeps_the_new_teacher_from_there_on(path: Path) -> None:
    TeacherLog(path, first_step=3)
    assert read_versions(path) == [FIRST, TeacherVersion(4, "main", "better", "f2", by="replacement")]
    TeacherLog(path, first_step=3)
    assert read_versions(path) == [FIRST, TeacherVersion(4, "main", "better", "f2", by="replacement")]


def model_in_force(path: Path, asked: Config) -> str:
    return in_force(path, make_config(), asked).teachers["main"].model


def test_a_resumed_run_goes_on_with_the_teacher_that_replaced_another(path: Path) -> None:
    assert model_in_force(path, make_config()) == "better"
    assert model_in_force(path, make_config("teachers.main.model=better")) == "better"


def test_a_run_whose_teachers_were_never_replaced_is_resumed_with_what_is_asked_for(tmp_path: Path) -> None:
    assert model_in_force(tmp_path / "teachers.jsonl", make_config("teachers.main.model=other")) == "other"


def test_changed_files_of_a_replaced_teacher_do_not_bring_the_first_one_back(path: Path) -> None:
    TeacherLog(path, first_step=8).note(TeacherVersion(9, "main", "better", "f3"))
    assert latest_versions(path)["main"] == TeacherVersion(9, "main", "better", "f3", by="replacement")
    assert model_in_force(path, make_config()) == "better"


def test_a_teacher_that_a_resumed_run_was_given_once_is_not_kept(tmp_path: Path) -> None:
    TeacherLog(tmp_path / "teachers.jsonl", first_step=3).note(TeacherVersion(4, "main", "other", "f4"))
    assert model_in_force(tmp_path / "teachers.jsonl", make_config()) == "teacher"
    assert model_in_force(tmp_path / "teachers.jsonl", make_config("teachers.main.model=third")) == "third"


def test_a_third_teacher_is_refused_in_one_sentence(path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"teacher main is better since step 6, but teachers.main.model = third is"
    ):
        model_in_force(path, make_config("teachers.main.model=third"))


def test_a_damaged_line_is_named(path: Path) -> None:
    path.write_text('{"step": 1, "teacher": 5}\n')
    with pytest.raises(CheckpointError, match=r"teachers.jsonl:1: says of no teacher who scores: "):
        latest_versions(path)
