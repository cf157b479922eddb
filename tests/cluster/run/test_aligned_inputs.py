"""What a run reads of a teacher with another tokenizer before anything starts."""

import json
from pathlib import Path

import pytest

from cluster.config.run_config import Config
from cluster.config.run_file import parse_run_config
from cluster.contracts.errors import ModelError
from cluster.run.inputs import Inputs, load_inputs
from teacher_workers.audit.runner import in_tokens_of
from tests.made_tokenizers import byte_level, sentencepiece
from tests.teacher_workers.backends.transformers_teacher import write_model

PROMPT = "the quick fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligned")
    write_model(folder / "student", byte_level(40))
    write_model(folder / "teacher", sentencepiece(25))
    (folder / "train.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    return folder


def config_of(folder: Path, *overrides: str) -> Config:
    run_file = f"""
    student.model = "{folder}/student"
    objective.preset = "cross-tokenizer"
    rollout.max_completion_tokens = 8
    [teachers.main]
    model = "{folder}/teacher"
    tokenizer = "aligned"
    [prompts]
    train = "{folder}/train.jsonl"
    template = "raw"
    """
    return parse_run_config(run_file, overrides)


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Inputs:
    return load_inputs(config_of(folder))


def test_the_teacher_reads_the_prompt_in_its_own_tokens(folder: Path, inputs: Inputs) -> None:
    prompt = inputs.prompts.prompt(0)
    assert prompt.token_ids.tolist() == byte_level(40)(PROMPT)["input_ids"]
    assert prompt.teacher_token_ids is not None
    assert prompt.teacher_token_ids.tolist() == sentencepiece(25)(PROMPT)["input_ids"]
    # Room for its prompt, and for a completion of twice as many tokens, and one more.
    assert inputs.scoring_model_len("main") == max(len(prompt.teacher_token_ids) + 16 + 1, inputs.max_model_len)


def test_the_run_knows_the_map_and_says_how_much_is_shared(folder: Path, inputs: Inputs) -> None:
    resolved = inputs.pairs.apply(config_of(folder))
    alignment = resolved.teachers["main"].alignment
    assert alignment is not None
    assert (alignment.student, alignment.stop_ids) == (str(folder / "student"), (2,))
    [line] = inputs.pairs.lines
    assert line.startswith("teachers.main: aligned with the student's tokens by their bytes; ")
    assert alignment.digest in line
    assert resolved.rollout.stop_token_ids == ()
    assert resolved.teachers["main"].excluded_token_ids == ()


def test_audited_rows_are_written_in_the_teachers_tokens(folder: Path, inputs: Inputs) -> None:
    teacher = inputs.pairs.apply(config_of(folder)).teachers["main"]
    row = inputs.prompts.prompt(0).token_ids
    [written] = in_tokens_of(teacher, [row])
    # Behind no other text, the space that the tokenizer puts before one is not the student's.
    assert sentencepiece(25).decode(written.tolist()) == PROMPT
    assert written.tolist() != row.tolist()


def test_without_aligned_the_pair_is_refused_as_before(folder: Path) -> None:
    with pytest.raises(ModelError, match="its tokenizer is not the student's"):
        load_inputs(config_of(folder, "teachers.main.tokenizer=same"))
