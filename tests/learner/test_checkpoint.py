"""A checkpoint is complete or absent."""

import json

import pytest

from cluster.contracts.errors import CheckpointError
from learner import checkpoint


def write(directory, step, state=None):
    folder = checkpoint.step_folder(directory, step)
    partial = checkpoint.begin(folder)
    (partial / "shard").write_bytes(b"weights")
    checkpoint.write_state(partial, state or {"step": step})
    checkpoint.commit(folder)
    return folder


def test_a_committed_checkpoint_can_be_read_back(tmp_path):
    folder = write(tmp_path, 7, {"step": 7, "consumed": [1, 2]})
    assert folder.name == "step-7"
    assert checkpoint.read_state(folder) == {"step": 7, "consumed": [1, 2]}
    assert (folder / "shard").read_bytes() == b"weights"


def test_what_was_not_committed_is_not_a_checkpoint(tmp_path):
    partial = checkpoint.begin(checkpoint.step_folder(tmp_path, 3))
    checkpoint.write_state(partial, {"step": 3})
    assert checkpoint.latest_checkpoint(tmp_path) is None


def test_a_second_attempt_starts_from_an_empty_folder(tmp_path):
    folder = checkpoint.step_folder(tmp_path, 3)
    (checkpoint.begin(folder) / "left over").touch()
    assert list(checkpoint.begin(folder).iterdir()) == []


def test_writing_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 3, {"attempt": 1})
    assert checkpoint.read_state(write(tmp_path, 3, {"attempt": 2})) == {"attempt": 2}


def test_the_latest_checkpoint_has_the_highest_step_not_the_last_name(tmp_path):
    for step in (2, 10, 9):
        write(tmp_path, step)
    (tmp_path / "step-99").mkdir()  # no state: not ours
    assert checkpoint.latest_checkpoint(tmp_path) == tmp_path / "step-10"


def test_a_directory_that_does_not_exist_has_no_checkpoint(tmp_path):
    assert checkpoint.latest_checkpoint(tmp_path / "absent") is None


def test_pruning_keeps_the_latest(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-2"]


def test_a_damaged_state_is_one_sentence(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no readable state\.json"):
        checkpoint.read_state(folder)


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot create step-1\.partial"):
        checkpoint.begin(checkpoint.step_folder(tmp_path / "file", 1))


def test_the_state_is_plain_json(tmp_path):
    folder = write(tmp_path, 1)
    assert json.loads((folder / "state.json").read_text()) == {"step": 1}
