"""A real `vllm serve` behind a URL gives the scores that our own pool gives."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors.cluster import PoolTimeouts
from cluster.actors.object_store import pack
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import Completion, SamplingSettings, ScoreRequest
from cluster.contracts.trajectory import GeneratedTrajectory, make_generated, ragged
from cluster.contracts.wire import from_wire
from cluster.demo import EMBEDDED
from cluster.models.model_checks import read_model
from teacher_workers.backends.base import check_teacher
from teacher_workers.backends.http import HttpBackend
from teacher_workers.pool import TeacherPool, start_pool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory
from tests.teacher_workers.vllm_server import NAME, VllmServer

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]

TOLERANCE = 1e-4  # nats; one model in float32
REQUEST = ScoreRequest("teacher", top_k=16)
ENGINE = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1)


@pytest.fixture(scope="module")
def server() -> Iterator[VllmServer]:
    server = VllmServer(EMBEDDED / "teacher")
    try:
        server.start()
        server.wait_until_ready()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def pools(ray_cluster: None, server: VllmServer) -> Iterator[dict[str, TeacherPool]]:
    """Start the embedded teacher as `own`, and workers that ask the server as `served`."""
    teachers = {
        "own": TeacherConfig(str(EMBEDDED / "teacher"), engine=ENGINE),
        "served": TeacherConfig(NAME, url=server.url, engine=ENGINE),
    }
    timeouts = PoolTimeouts(start_seconds=500, call_seconds=120)
    pools = {name: start_pool(name, teacher, 128, [{"num_cpus": 1}], timeouts) for name, teacher in teachers.items()}
    for pool in pools.values():
        pool.wait_until_ready()
    yield pools
    for pool in pools.values():
        pool.shutdown()


def make_rows(route: str) -> list[GeneratedTrajectory]:
    """Build rows of several lengths, up to the whole context but one, some with a gap in what was sampled."""
    draw = np.random.default_rng(7)
    rows = [
        make_trajectory(
            prompt=draw.integers(4, 112, 5 + row),
            completion=draw.integers(4, 112, completion),
            trajectory_id=row,
            teacher=route,
        )
        for row, completion in enumerate((3, 17, 64, 118))
    ]
    gap = rows[2]
    mask = gap.loss_mask.copy()
    mask[20:30] = 0
    rows[2] = replace(gap, loss_mask=mask, rollout_logprobs=gap.rollout_logprobs[: int(mask.sum())])
    return rows


def make_handle(route: str) -> BatchHandle:
    wire, handle = pack(make_generated(make_rows(route)), {})
    return replace(handle, reference=ray.put(wire))


def columns(pools: dict[str, TeacherPool], name: str, request: ScoreRequest) -> dict[str, Any]:
    router = TeacherRouter(pools, call_seconds=120)
    [handle] = router.score([make_handle(name)], lambda route: [(route, request)])
    batch = from_wire(ray.get(handle.reference), "scored")
    names = ("teacher_logprobs", "candidate_ids", "teacher_candidate_logprobs")
    return {name: ragged(batch, name).values for name in names if name in batch.schema.names}


def test_a_served_teacher_scores_as_our_own_pool_does(pools: dict[str, TeacherPool]) -> None:
    own, served = (columns(pools, name, REQUEST) for name in ("own", "served"))
    assert len(own["teacher_logprobs"]) == 3 + 17 + 54 + 118
    for name in ("teacher_logprobs", "teacher_candidate_logprobs"):
        assert np.abs(own[name] - served[name]).max() < TOLERANCE
    assert np.mean(own["candidate_ids"] == served["candidate_ids"]) > 0.99  # ties come in any order
    sampled = columns(pools, "served", ScoreRequest("teacher"))
    assert np.abs(own["teacher_logprobs"] - sampled["teacher_logprobs"]).max() < TOLERANCE


def test_the_server_says_its_context_its_limit_and_the_texts_of_its_tokens(server: VllmServer) -> None:
    student = read_model(StudentConfig(str(EMBEDDED / "student")), is_student=True)
    teacher = TeacherConfig(NAME, url=server.url, engine=ENGINE)
    assert check_teacher("main", teacher, student).context_tokens == 128
    assert HttpBackend.fault(teacher, ScoreRequest("teacher", top_k=20)) is None
    fault = HttpBackend.fault(teacher, ScoreRequest("teacher", top_k=21)) or ""
    assert "lists up to 20 tokens per position by their ids, and the objective compares 21" in fault


def test_a_served_teacher_writes_tokens_with_the_log_probabilities_that_it_gives_them(server: VllmServer) -> None:
    teacher = TeacherConfig(NAME, url=server.url, engine=ENGINE)
    assert HttpBackend.sampling_fault(teacher) is None

    async def run() -> tuple[Completion, Completion, Any]:
        backend = HttpBackend(teacher, max_model_len=128)
        try:
            sampling, prompt = SamplingSettings(8, 1.0, stop_token_ids=(3,)), [1, 20, 30]
            first, again = [await backend.generate(prompt, sampling, seed=9, priority=0) for _ in range(2)]
            row = make_trajectory(prompt, first.token_ids.tolist())
            return first, again, (await backend.score(make_generated([row]), ScoreRequest("teacher")))[0]
        finally:
            await backend.shutdown()

    first, again, scores = asyncio.run(run())
    assert 0 < len(first.token_ids) <= 8
    assert first.token_ids.tolist() == again.token_ids.tolist()
    np.testing.assert_allclose(first.logprobs, scores["logprobs"], atol=TOLERANCE)
