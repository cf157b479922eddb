"""Damaged model directories end in one sentence before any engine or actor starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli import main
from cluster.config.run_config import Config
from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import ConfigError, ModelError
from cluster.models import weight_files
from cluster.run.inputs import load_inputs
from learner.model.student import load_student
from tests.builders import make_config
from tests.malformed.damage import EMBEDDING, as_pickle, configured, tensors
from tests.malformed.model_cases import MODELS
from tests.malformed.refusal import SECONDS_PER_CASE, assert_refused, assert_sentence

pytestmark = pytest.mark.timeout(SECONDS_PER_CASE)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """Copy a whole model to where it may be damaged, as student and as teacher, beside a prompt file."""
    for name in ("student", "teacher"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "train.jsonl").write_text('{"prompt": "w4"}\n')
    return tmp_path


def settings(folder: Path) -> list[str]:
    return [
        f"student.model={folder / 'student'}",
        f"teachers.main.model={folder / 'teacher'}",
        f"prompts.train={folder / 'train.jsonl'}",
        "prompts.template=raw",
        "rollout.max_completion_tokens=8",
        f"run.directory={folder / 'runs'}",
    ]


def config(folder: Path, *overrides: str) -> Config:
    return make_config(*settings(folder), *overrides)


@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model_is_one_sentence(name: str, folder: Path) -> None:
    case = MODELS[name]
    case.spoil(folder / case.whose)
    assert_refused(lambda: load_inputs(config(folder)), ModelError, case.says, folder)


def test_a_file_that_the_machine_has_no_memory_to_map_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise RuntimeError("unable to mmap 65524335640 bytes from file: Cannot allocate memory (12)")  # torch's words

    monkeypatch.setattr(weight_files, "safe_open", refuse)
    says = "model.safetensors is too large for this machine's memory: unable to mmap"
    assert_refused(lambda: load_inputs(config(folder)), ModelError, says, folder)


def test_the_model_that_is_damaged_here_is_whole(folder: Path) -> None:
    assert len(load_inputs(config(folder)).prompts) == 1


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_tied_head_that_is_saved_a_second_time_is_accepted(whose: str, folder: Path) -> None:
    tensors(lambda found: found.update({"lm_head.weight": found[EMBEDDING].clone()}))(folder / whose)
    assert len(load_inputs(config(folder)).prompts) == 1


def test_a_quantised_teacher_is_accepted(folder: Path) -> None:
    configured(quantization_config={"quant_method": "fp8", "activation_scheme": "dynamic"})(folder / "teacher")
    assert len(load_inputs(config(folder)).prompts) == 1


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("absent", "no such directory"),
        ("train.jsonl", "no such directory"),
        ("x" * 300, "no such directory"),
        ("line\nbreak", "line break': no such directory"),
    ],
)
def test_what_is_no_model_directory_is_named(model: str, says: str, folder: Path) -> None:
    broken = config(folder, f"student.model={folder / model}")
    assert_refused(lambda: load_inputs(broken), ModelError, says, folder)


def test_more_candidates_than_tokens_are_refused(folder: Path) -> None:
    broken = config(folder, "objective.support_size=113")
    assert_refused(lambda: load_inputs(broken), ConfigError, "more than the 112 tokens", folder)


@pytest.mark.parametrize("name", ["no weights", "a pickle", "config.json null", "shard missing", "model_type unknown"])
def test_the_command_line_prints_one_line_about_a_model(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = MODELS[name]
    case.spoil(folder / case.whose)
    run_file = folder / "run.toml"
    run_file.write_text('[student]\nmodel = "s"\n[teachers.main]\nmodel = "t"\n[prompts]\ntrain = "p"\n')
    assert main(["train", str(run_file), *settings(folder)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert_sentence(printed.err, case.says)
    assert not (folder / "runs").exists()


def test_the_learner_takes_no_pickle(folder: Path) -> None:
    as_pickle("pytorch_model.bin")(folder / "student")
    student = StudentConfig(str(folder / "student"))
    assert_refused(lambda: load_student(student, LearnerConfig()), ModelError, "cannot load its weights", folder)


def test_the_learner_makes_up_no_parameters(folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    weights = load_file(path)
    del weights["model.norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    student = StudentConfig(str(folder / "student"))
    says = "its safetensors lack 1 of its parameters, first 'model.norm.weight'"
    assert_refused(lambda: load_student(student, LearnerConfig(dtype="float32")), ModelError, says, folder)


def test_flipped_bits_of_a_header_never_end_the_process(folder: Path) -> None:
    path = folder / "student" / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for offset in torch.randint(0, header, (60,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        try:
            load_inputs(config(folder))
        except ModelError as error:
            assert_sentence(str(error), "student")
