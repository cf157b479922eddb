"""A real engine of two ranks, each with half of the LM head, scores as one of a single rank does; on a CPU."""

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated, ragged
from cluster.vllm.engine import prepare_environment
from teacher_workers.actor import TeacherWorker
from tests.builders import make_trajectory
from tests.teacher_workers.conftest import ENGINE
from tests.tiny_qwen3 import CONTEXT_TOKENS, NUM_WORDS

# Two engines, of which one has two worker processes; `tests/cluster/models/test_token_scores.py` holds the shards
# alone in `make test`.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]

REQUESTS = {
    "sampled": ScoreRequest("teacher"),
    "top-k": ScoreRequest("teacher", top_k=8),
    "entropy": ScoreRequest("teacher", top_k=3, entropy=True, hidden=True),
}


def make_batch() -> pa.RecordBatch:
    draw = np.random.default_rng(0)
    rows = [
        make_trajectory(
            prompt=draw.integers(4, NUM_WORDS, 5 + 3 * row),
            completion=draw.integers(4, NUM_WORDS, 60 - 10 * row),
            trajectory_id=row,
        )
        for row in range(4)
    ]
    return make_generated(rows)


async def scored(teacher: TeacherConfig, batch: pa.RecordBatch) -> dict[str, pa.RecordBatch]:
    from teacher_workers.backends.vllm import VllmBackend

    backend = VllmBackend(teacher, CONTEXT_TOKENS)
    try:
        worker = TeacherWorker("teacher", backend)
        return {name: (await worker.score(batch, request))[0] for name, request in REQUESTS.items()}
    finally:
        await backend.shutdown()


def test_two_ranks_score_as_one(tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in os.environ.items():
        monkeypatch.setenv(name, value)  # what engines set is taken back
    batch = make_batch()
    found: list[dict[str, Any]] = []
    for ranks in (1, 2):
        engine = EngineConfig(dtype="float32", tensor_parallel=ranks, **ENGINE)
        prepare_environment(engine)
        found.append(asyncio.run(scored(TeacherConfig(model=str(tiny_teacher), engine=engine), batch)))
    one, two = found
    for name in REQUESTS:
        for column in one[name].schema.names:
            if not column.startswith(("teacher_", "candidate_ids")) or "version" in column:
                continue
            values, others = (ragged(batches[name], column).values for batches in (one, two))
            np.testing.assert_allclose(others, values, rtol=0, atol=1e-5, err_msg=f"{name}: {column}")
