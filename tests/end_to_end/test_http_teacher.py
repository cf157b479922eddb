"""A run whose teacher is a real `vllm serve` learns what it learns from our own pool, whatever befalls the server."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from cluster.cli import main
from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import make_generated
from cluster.demo import EMBEDDED
from teacher_workers.backends.http import HttpBackend
from tests.builders import make_trajectory
from tests.end_to_end.conftest import records_of
from tests.end_to_end.runs import Run, running
from tests.teacher_workers.backends.fake_server import FakeServer
from tests.teacher_workers.vllm_server import NAME, VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900)]

TOLERANCE = 1e-4  # nats
STEPS = 3
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


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    """Start a server, which becomes ready while others run."""
    server = VllmServer(EMBEDDED / "teacher")
    try:
        server.start()
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
    with running(tmp_path / "own", *SHORT) as own:
        own.process.wait()
    assert own.process.returncode == 0, "".join(own.lines)
    server.wait_until_ready()
    served = (f"teachers.countdown.url={server.url}", f"teachers.countdown.model={NAME}")
    with running(tmp_path / "served", *SHORT, *served) as run:
        run.wait_for("step 1 ")
        server.end()
        server.start()
        run.process.wait()
    assert run.process.returncode == 0, "".join(run.lines)
    assert sum("is taken to have the student's tokenizer" in line for line in run.lines) == 1
    ours, theirs = losses(own), losses(run)
    for name, values in ours.items():
        assert len(values) == STEPS
        assert theirs[name] == pytest.approx(values, abs=TOLERANCE), name
    assert sum(record.get("teacher/retries", 0) for record in records_of(run.directory)) > 0
    assert main(["verify", str(run.directory)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{STEPS} steps, {STEPS * 32} trajectories: each was learned from exactly")
    config = json.loads((run.directory / "config.json").read_text())
    assert config["teachers"]["countdown"]["backend"] == "http"


class EchoOnly(FakeServer):
    """Passes completions on to a real server, without the fields that only vLLM has."""

    behind = ""

    def complete(self, path: str, body: dict[str, Any], authorization: str | None) -> tuple[int, bytes]:
        body.pop("prompt_logprobs", None)
        answer = httpx.post(f"{self.behind}/completions", json=body, timeout=60)
        content = answer.json()
        for choice in content.get("choices", []):
            choice.pop("prompt_logprobs", None)
        return answer.status_code, json.dumps(content).encode()


def test_the_echoed_form_of_the_same_server_gives_the_same_scores(server: VllmServer) -> None:
    batch = make_generated([make_trajectory(prompt=range(4, 20), completion=range(30, 60), teacher="countdown")])

    async def run(url: str) -> Scores:
        teacher = TeacherConfig(NAME, url=url, retry_seconds=10, engine=EngineConfig(dtype="float32"))
        backend = HttpBackend(teacher, max_model_len=128)
        try:
            return (await backend.score(batch, ScoreRequest("teacher", top_k=16)))[0]
        finally:
            await backend.shutdown()

    server.wait_until_ready()
    with EchoOnly() as echo:
        echo.behind = server.url
        listed, echoed = asyncio.run(run(server.url)), asyncio.run(run(echo.url))
    for name in ("logprobs", "candidate_logprobs"):
        assert np.abs(listed[name] - echoed[name]).max() < TOLERANCE
    assert np.mean(listed["candidate_ids"] == echoed["candidate_ids"]) > 0.99
