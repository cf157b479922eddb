"""The hard task with hints: its prompts, and what the student reads with them."""

import json
import re
from pathlib import Path

import pytest

from cluster.config.run_file import load_run_config
from cluster.demo import EMBEDDED
from cluster.models.model_files import load_tokenizer
from cluster.run.inputs import load_inputs
from examples.hints import make_prompts
from rollout_workers.contexts.builder import ContextBuilder
from rollout_workers.privileged import PrivilegedSampler

RUN_FILE = Path(make_prompts.__file__).parent / "one_try.toml"


def test_the_sampler_reads_the_right_pair_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_prompts, "SIZES", {"train": 8, "held_out": 4})
    make_prompts.write_prompts(tmp_path)
    student = str(EMBEDDED / "student")
    paths = [f"prompts.{name}={tmp_path / name}.jsonl" for name in ("train", "held_out")]
    inputs = load_inputs(load_run_config(RUN_FILE, [f"student.model={student}", *paths]))
    assert inputs.privileged.prompt_ids == set(range(8))  # held-out prompts are none of the sampler's
    settings, tokenizer = inputs.privileged.settings, load_tokenizer(student)
    assert settings is not None
    builder = ContextBuilder(settings.contexts, tokenizer, inputs.prompts)
    sampler = PrivilegedSampler(settings, builder, None, None)  # type: ignore[arg-type]
    for number, line in enumerate((tmp_path / "train.jsonl").read_text().splitlines()):
        row = json.loads(line)
        target, first, second = re.fullmatch(
            r"<bos> (\d+) : (\d+) (\d+) \2 \3 \2 \3 \|", _text(tokenizer, sampler, number)
        ).groups()  # type: ignore[union-attr]
        assert int(first) + int(second) == int(target)
        assert {first, second} <= set(row["prompt"].split(":")[1].split())
        assert re.fullmatch(row["answer"], f"{first} + {second} = {target}")


def _text(tokenizer: object, sampler: PrivilegedSampler, number: int) -> str:
    return str(tokenizer.decode(sampler.prompt_ids(number)))  # type: ignore[attr-defined]
