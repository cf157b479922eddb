"""One short run of the embedded models through the real stack, shared by the tests that look at it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.runs import SMALL, BalanceSample, look_on, running

STEPS = 6
SHORT = (
    *SMALL,
    f"run.steps={STEPS}",
    "evaluation.num_prompts=64",
    "evaluation.every_steps=3",
    "checkpoint.every_steps=3",
    "learner.lr_schedule=constant",  # so that more steps change nothing in those that were planned
    "rollout.stop_repetition=8",
    "ray.dashboard=false",
)
# Values that must appear nowhere but in the environment that they were given in.
CANARIES = {
    "HF_TOKEN": "hf_canary4f1d0c7a",
    "WANDB_API_KEY": "wandbcanary9b2e6d31",
    "RAY_AUTH_TOKEN": "ab7c" * 16,
}


@dataclass(frozen=True)
class ShortRun:
    """The folder and the words of a run that came to its end, and what was seen of it from outside."""

    path: Path
    output: str
    seen: BalanceSample
    left: list[str]  # processes, shared memory and files, once things had time to settle

    def records(self) -> list[dict[str, Any]]:
        """Return the figures of every step."""
        return records_of(self.path)


def records_of(path: Path) -> list[dict[str, Any]]:
    """Return the figures of every step of a run."""
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """Train the embedded student for a few steps on two learner ranks, with secrets around and an open umask."""
    directory = tmp_path_factory.mktemp("parent") / "made/by/the/run"
    before = os.umask(0)
    try:
        with running(directory, *SHORT, "ray.dashboard=true", **CANARIES) as run:
            os.umask(before)
            seen = look_on(run)
            left = run.left()
    finally:
        os.umask(before)
    return ShortRun(run.directory, "".join(run.lines), seen, left)
