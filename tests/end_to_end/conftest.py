"""One short run of the embedded models through the real stack, shared by the tests that look at what it left."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

STEPS = 6
SHORT = (
    f"run.steps={STEPS}",
    "prompts.prompts_per_step=32",
    "evaluation.num_prompts=64",
    "learner.warmup_steps=1",
    "evaluation.every_steps=3",
    "checkpoint.every_steps=3",
    "learner.num_workers=2",
    "ray.dashboard=false",
)
COMMAND_TIMEOUT_SECONDS = 240


@dataclass(frozen=True)
class Finished:
    """A finished `preceptor` command."""

    code: int
    output: str
    error: str


@dataclass(frozen=True)
class ShortRun:
    """The folder and the last words of a short run."""

    path: Path
    output: str

    def records(self) -> list[dict[str, Any]]:
        """Return the figures of every step."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


def preceptor(*arguments: str) -> Finished:
    """Run the command line in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_SECONDS,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Finished(found.returncode, found.stdout, found.stderr)


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> ShortRun:
    """Train the embedded student for a few steps on two learner ranks."""
    directory = tmp_path_factory.mktemp("runs")
    found = preceptor("demo", "run.name=short", f"run.directory={directory}", *SHORT)
    assert found.code == 0, found.error
    return ShortRun(directory / "short", found.output)
