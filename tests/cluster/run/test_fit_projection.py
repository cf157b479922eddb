"""`preceptor fit-projection` makes the bank that a run file names, of what its student writes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.cli import main
from cluster.models.hidden_layers import load_bank
from tests.architectures.models import ARCHITECTURES, make_tokenizer, write_prompts

RUN_FILE = """
[student]
model = "{folder}/student"
[teachers.main]
model = "{folder}/teacher"
[prompts]
train = "{folder}/prompts.jsonl"
prompts_per_step = 2
[rollout]
max_completion_tokens = 24
[objective.terms.states]
loss = "representation"
layers = "all"
bank = "{folder}/bank.safetensors"
"""


def write_models(folder: Path) -> None:
    """Write a student of two layers, and a teacher of four wider ones."""
    for name, depth, width in (("student", 2, 64), ("teacher", 4, 96)):
        config = ARCHITECTURES["llama"]()
        config.num_hidden_layers, config.hidden_size = depth, width
        torch.manual_seed(depth)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    write_prompts(folder / "prompts.jsonl")


def test_a_bank_is_fitted_to_what_the_student_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN_FILE.format(folder=tmp_path))
    assert main(["fit-projection", str(run_file), "--rank", "4"]) == 0
    bank = load_bank(str(tmp_path / "bank.safetensors"))
    assert bank.layers == {"student": (1, 2), "teacher": (1, 4)}
    assert bank.depths == {"student": 2, "teacher": 4}
    assert (bank.rank, bank.width("student"), bank.width("teacher")) == (4, 64, 96)
    lines = capsys.readouterr().out.splitlines()
    assert "layer 2 of the student, 4 of the teacher: the components hold" in lines[-2]
    assert lines[-1] == f"{tmp_path}/bank.safetensors: rank 4, 16 bytes a token in bfloat16, hash {bank.digest}"


def test_a_run_file_without_a_bank_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN_FILE.format(folder=tmp_path).replace("bank =", "normalise = 'rms' #"))
    assert main(["fit-projection", str(run_file)]) == 1
    assert "no representation term names a bank" in capsys.readouterr().err
