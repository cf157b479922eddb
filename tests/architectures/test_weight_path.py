"""New weights reach every parameter of a rollout engine, whatever the architecture; an engine per model, no Ray."""

import json
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.architectures.models import ARCHITECTURES, write_model
from tests.architectures.weight_path import TOLERANCE
from tests.interpreter import python

PROGRAM = "import sys; from tests.architectures.weight_path import main; sys.exit(main())"
# vLLM runs these by transformers' classes, which it changes: a learner in the same process runs them no more.
NOT_IN_ONE_PROCESS = ("olmo2", "smollm3")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("preloaded")]


def tried(names: tuple[str, ...], folder: Path) -> dict[str, dict[str, Any]]:
    """Return what the models' weights did, all in one process."""
    folders = [str(write_model(name, folder / name, seed=0)) for name in names]
    command = [python(), "-c", PROGRAM, *folders]
    with TemporaryDirectory() as own:  # at its end, vLLM leaves the file by which the ranks of an engine meet
        environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "TMPDIR": own}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
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
    answer = tried(("mixtral",), tmp_path)["mixtral"]
    check(answer)
    # Three matrices of 64 x 128 for each of four experts, of which one did not come.
    assert "experts.routed_experts (73,728 of 98,304 values)" in answer["without an expert"]


@pytest.mark.exhaustive
def test_every_architecture_follows_the_learner(tmp_path: Path) -> None:
    names = tuple(name for name in ARCHITECTURES if name not in NOT_IN_ONE_PROCESS)
    for answer in tried(names, tmp_path).values():
        check(answer)
