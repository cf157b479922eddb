"""What a user gets wrong is one sentence on standard error, an exit code that is not 0, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.demo import EMBEDDED
from tests.end_to_end.conftest import SHORT
from tests.end_to_end.runs import preceptor

Files = dict[str, Path]
Spoil = Callable[[Files], None]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Copy the embedded models and prompts to where a test may damage them."""
    for name in ("student", "teacher"):
        shutil.copytree(EMBEDDED / name, tmp_path / name)
    for name in ("train.jsonl", "held_out.jsonl"):
        lines = (EMBEDDED / name).read_text().splitlines()[:64]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return {name: tmp_path / name for name in ("student", "teacher", "train.jsonl", "held_out.jsonl", "runs")}


def arguments(files: Files) -> list[str]:
    return [
        str(EMBEDDED / "demo.toml"),
        f"student.model={files['student']}",
        f"teachers.countdown.model={files['teacher']}",
        f"prompts.train={files['train.jsonl']}",
        f"prompts.held_out={files['held_out.jsonl']}",
        f"run.directory={files['runs']}",
        "run.name=bad",
        *SHORT,
    ]


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def swap_two_tokens(files: Files) -> None:
    path = files["teacher"] / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda files: shutil.rmtree(files["teacher"]), "teacher': no such directory; give a Hugging Face directory"),
        (
            lambda files: (files["student"] / "config.json").unlink(),
            "student/config.json: cannot read the model file: No such file",
        ),
        (swap_two_tokens, "teachers.countdown: its tokenizer is not the student's: token '1' has id"),
        (lambda files: replace_line(files["train.jsonl"], 9, '{"prompt": '), "train.jsonl:9: not a prompt object"),
        (
            lambda files: replace_line(files["held_out.jsonl"], 2, '{"prompt": ""}'),
            "held_out.jsonl:2: `prompt` is empty",
        ),
        (
            lambda files: replace_line(files["train.jsonl"], 3, json.dumps({"prompt": "1 " * 500})),
            "train.jsonl:3: the prompt has 501 tokens, but a context of",
        ),
        (
            lambda files: replace_line(files["train.jsonl"], 4, '{"prompt": "1", "answer": "("}'),
            "train.jsonl:4: answer '(' is not a regular expression",
        ),
    ],
)
def test_bad_files_are_named_before_anything_starts(
    files: Files, spoil: Spoil, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(files)
    assert main(["train", *arguments(files)]) == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not files["runs"].exists()


def test_an_unknown_field_is_named_with_its_path(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *arguments(files), "learner.learning_rat=1"]) == 1
    assert (
        "demo.toml: learner: Object contains unknown field `learning_rat`; did you mean learning_rate?\n"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("preloaded")
def test_a_teacher_that_returns_nan_is_named_and_nothing_is_learned_from_it(files: Files) -> None:
    path = files["teacher"] / "model.safetensors"
    weights = {name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    few = ("prompts.prompts_per_step=8", "evaluation.num_prompts=4", "learner.num_workers=1")
    found = preceptor("train", *arguments(files), "evaluation.teacher_too=false", *few)
    assert found.code == 1
    assert "teacher-countdown-0: trajectory" in found.error
    assert "NaN" in found.error
    assert found.error.count("\n") == 1
    assert not (files["runs"] / "bad/checkpoints").exists()
    assert not (files["runs"] / "bad/metrics.jsonl").exists()
