"""A checkpoint's shards give whole parameters; an export can be written, and ends where the completions did."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from cluster.contracts.errors import CheckpointError
from learner.checkpointing.export import finished_settings, whole_parameters
from learner.checkpointing.manifest import Layout, shard_name
from learner.checkpointing.shards import write_shard

SHAPES = {"a": (2, 2), "b": (3,), "c": ()}  # 8 weights: 0 to 7


def write(folder: Path, *ranks: list[list[float]]) -> None:
    for rank, parts in enumerate(ranks):
        tensors = {f"{position}.weights": torch.tensor(part) for position, part in enumerate(parts)}
        write_shard(folder / shard_name(rank), tensors | {"0.exp_avg": torch.tensor(parts[0])})


def whole(folder: Path, num_ranks: int, zero_stage: int) -> dict[str, list[float]]:
    parameters = dict(whole_parameters(folder, Layout(num_ranks, zero_stage), SHAPES))
    assert {name: tuple(value.shape) for name, value in parameters.items()} == SHAPES
    return {name: value.flatten().tolist() for name, value in parameters.items()}


EXPECTED = {"a": [0, 1, 2, 3], "b": [4, 5, 6], "c": [7]}


def test_a_flat_vector_is_cut_into_equal_parts_under_stage_2(tmp_path: Path) -> None:
    write(tmp_path, [[0.0, 1, 2, 3, 4]], [[5.0, 6, 7, -1, -1]])  # padded to 10
    assert whole(tmp_path, 2, 2) == EXPECTED


def test_every_parameter_is_cut_under_stage_3(tmp_path: Path) -> None:
    # In two sub-groups; b's last part is padded by one, and c by one.
    write(tmp_path, [[0.0, 1], [4.0, 5, 7]], [[2.0, 3], [6.0, -1, -1]])
    assert whole(tmp_path, 2, 3) == EXPECTED


def test_one_rank_of_plain_torch_has_whole_parameters(tmp_path: Path) -> None:
    write(tmp_path, [[0.0, 1, 2, 3], [4.0, 5, 6], [7.0]])
    assert whole(tmp_path, 1, 0) == EXPECTED


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_masters_of_another_student_are_refused(zero_stage: int, tmp_path: Path) -> None:
    for length in (3, 12):
        folder = tmp_path / str(length)
        folder.mkdir()
        write(folder, [[0.0] * length], [[0.0] * length])
        with pytest.raises(CheckpointError, match="put the student's files back"):
            whole(folder, 2, zero_stage)


class Tokenizer:
    eos_token_id = 3


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.9, "top_p": 0.6}, {"num_beams": 1, "length_penalty": 2.0, "early_stopping": True}]
)
def test_settings_that_load_but_do_not_save_are_mended(wrong: dict[str, float], tmp_path: Path) -> None:
    settings = GenerationConfig(**wrong, eos_token_id=3, pad_token_id=0)
    with pytest.raises(ValueError, match="Fix these issues"):
        settings.save_pretrained(tmp_path)
    finished_settings(settings, Tokenizer(), ()).save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.pad_token_id) == (3, 0)
    if "temperature" in wrong:
        assert (saved.temperature, saved.top_p, saved.do_sample) == (0.9, 0.6, True)


@pytest.mark.parametrize(("own", "expected"), [(3, [3, 4]), ([5, 3], [3, 4, 5]), (None, [3, 4])])
def test_an_export_ends_where_the_runs_completions_did(own: int | list[int] | None, expected: list[int]) -> None:
    assert finished_settings(GenerationConfig(eos_token_id=own), Tokenizer(), (4,)).eos_token_id == expected


def test_without_further_stop_ids_the_students_own_stay() -> None:
    assert finished_settings(GenerationConfig(eos_token_id=9), Tokenizer(), ()).eos_token_id == 9
