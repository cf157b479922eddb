"""A run whose teacher is a real `vllm serve` learns what it learns from our own pool, whatever befalls the server."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.demo import EMBEDDED
from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import Run, running
from tests.teacher_workers.vllm_server import NAME, VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900)]

TOLERANCE = 1e-4  # nats
STEPS = 4
SHORT = (
    f"run.steps={STEPS}",
    "learner.num_workers=1",
    "rollout.max_completion_tokens=24",
    "evaluation.num_prompts=8",
    "evaluation.every_steps=0",
    "evaluation.teacher_too=false",
    "checkpoint.export=false",
    "ray.dashboard=false",
    "score_audit.every_steps=2",
)


@pytest.fixture
def server() -> Iterator[VllmServer]:
    server = VllmServer(EMBEDDED / "teacher")
    try:
        server.start()
        server.wait_until_ready()
        yield server
    finally:
        server.close()


def losses(run: Run) -> dict[str, list[float]]:
    names = ("train/loss", "train/kl", "teacher/logprob", "teacher/sampled_kl")
    records = [record for record in records_of(run.directory) if "train/loss" in record]
    return {name: [record[name] for record in records] for name in names}


def test_a_served_teacher_that_is_killed_and_comes_back_teaches_the_same(
    tmp_path: Path, server: VllmServer, capsys: Any
) -> None:
    served = (f"teachers.countdown.url={server.url}", f"teachers.countdown.model={NAME}")
    with running(tmp_path / "served", *SHORT, *served) as run:
        for step, number in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
            run.wait_for(f"step {step} ")
            server.end(number)
            server.start()
        run.process.wait()
    assert run.process.returncode == 0, "".join(run.lines)
    assert sum("is taken to have the student's tokenizer" in line for line in run.lines) == 1
    with running(tmp_path / "own", *SHORT) as own:
        own.process.wait()
    assert own.process.returncode == 0, "".join(own.lines)
    ours, theirs = losses(own), losses(run)
    for name, values in ours.items():
        assert len(values) == STEPS
        assert theirs[name] == pytest.approx(values, abs=TOLERANCE), name
    assert sum(record.get("teacher/retries", 0) for record in records_of(run.directory)) > 0
    assert main(["verify", str(run.directory)]) == 0
    assert capsys.readouterr().out.startswith(
        f"{STEPS} steps, {STEPS * 32} trajectories: each was learned from exactly"
    )
    config = json.loads((run.directory / "config.json").read_text())
    assert config["teachers"]["countdown"]["backend"] == "http"
