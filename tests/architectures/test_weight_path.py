"""New weights reach every parameter of a rollout engine, whatever the architecture; an engine per model, no Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.architectures.models import ARCHITECTURES, write_model
from tests.architectures.weight_path import TOLERANCE

WITH_EXPERTS = ("qwen3-moe", "mixtral")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def tried(names: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the models' weights did, all in one process."""
    folders = [str(write_model(name, folder / name, seed=0)) for name in names]
    command = [sys.executable, "-m", "tests.architectures.weight_path", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {answer["model"]: answer for answer in answers}


def check(answer: dict[str, Any]) -> None:
    """Hold one model's answer against what must be."""
    assert answer["fault"] is None
    assert answer["moved"] > 20 * TOLERANCE  # else nothing below could fail
    ways = ("loaded", "full", "delta", "again whole", "exported to transformers", "exported to vLLM")
    assert all(answer[way] < TOLERANCE for way in ways), answer
    assert "the update lacks" in answer["without a norm"]


def test_experts_follow_the_learner_and_one_that_stays_behind_is_an_error(tmp_path: Path) -> None:
    answers = tried(WITH_EXPERTS, tmp_path)
    for name in WITH_EXPERTS:
        check(answers[name])
        # Three matrices of 64 x 64 or 64 x 128 for each of four experts, of which one did not come.
        total = 4 * 3 * 64 * (64 if name == "qwen3-moe" else 128)
        assert f"({total * 3 // 4:,} of {total:,} values)" in answers[name]["without an expert"]


@pytest.mark.exhaustive
def test_every_architecture_follows_the_learner(tmp_path: Path) -> None:
    for answer in tried(tuple(ARCHITECTURES), tmp_path).values():
        check(answer)
