"""A checkpoint is complete or absent."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster.contracts.errors import CheckpointError
from learner.checkpointing import checkpoint
from learner.checkpointing.manifest import verify
from tests.learner.checkpointing.checkpoints import LAYOUT, write_checkpoint


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_committed_checkpoint_can_be_read_back(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 7, {"step": 7, "consumed": [1, 2]})
    verify(folder, LAYOUT)
    assert folder.name == "step-7"
    assert checkpoint.read_state(folder) == {"step": 7, "consumed": [1, 2]}
    assert torch.equal(load_file(folder / "rank-1.safetensors")["0.weights"], torch.arange(6.0))


def test_only_json_and_safetensors_lie_in_a_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    assert names(folder) == ["manifest.json", "rank-0.safetensors", "rank-1.safetensors", "state.json"]
    for name in ("manifest.json", "state.json"):
        assert isinstance(json.loads((folder / name).read_text()), dict)


def test_what_was_not_committed_is_not_a_checkpoint(tmp_path: Path) -> None:
    (checkpoint.begin(checkpoint.step_folder(tmp_path, 3)) / "rank-0.safetensors").touch()
    assert checkpoint.checkpoints(tmp_path) == []


def test_a_second_attempt_starts_from_an_empty_folder(tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 3)
    (checkpoint.begin(folder) / "left over").touch()
    assert list(checkpoint.begin(folder).iterdir()) == []


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 3, {"attempt": 1})
    assert checkpoint.read_state(write_checkpoint(tmp_path, 3, {"attempt": 2})) == {"attempt": 2}
    assert names(tmp_path) == ["step-3"]


def test_checkpoints_come_in_the_order_of_their_steps_not_of_their_names(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step)
    for foreign in ("step-099", "step-x", "step-4.damaged", "other"):
        (tmp_path / foreign).mkdir()
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-2", "step-9", "step-10"]


def test_a_directory_that_does_not_exist_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.checkpoints(tmp_path / "absent") == []


def test_pruning_keeps_the_latest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write_checkpoint(tmp_path, step)
    (write_checkpoint(tmp_path, 11) / "manifest.json").unlink()
    checkpoint.prune(tmp_path, keep_last=2)
    assert names(tmp_path) == ["step-10", "step-11", "step-2"]


def test_what_a_killed_run_left_is_cleaned_and_passed_over_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (4, 8):
        write_checkpoint(tmp_path, step)
    for left in ("step-12.partial", "step-2.removed"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "rank-0.safetensors").touch()
    (tmp_path / "notes.partial").touch()  # not ours
    checkpoint.tidy(tmp_path, last_step=4)
    assert names(tmp_path) == ["notes.partial", "step-4", "step-8.damaged"]


def test_a_place_that_cannot_be_written_to_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot create step-1\.partial"):
        checkpoint.begin(checkpoint.step_folder(tmp_path / "file", 1))


def test_another_number_of_ranks_and_another_stage_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    expected = "num_workers = 2 and learner.zero_stage = 2, but the run has 4 and 3"
    with pytest.raises(CheckpointError, match=expected):
        verify(folder, type(LAYOUT)(num_ranks=4, zero_stage=3))
