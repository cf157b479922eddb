"""A real engine of two ranks, each with half of the LM head, scores as one of a single rank does; on a CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from cluster.actors.object_store import pack
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated, ragged
from cluster.contracts.wire import from_wire
from teacher_workers.pool import TeacherPool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory
from tests.teacher_workers.conftest import start
from tests.tiny_qwen3 import NUM_WORDS

# An engine of its own, with a process for each rank; `tests/cluster/models/test_token_scores.py` holds the shards alone
# in `make test`.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]

REQUESTS = {
    "sampled": ScoreRequest("teacher"),
    "top-k": ScoreRequest("teacher", top_k=8),
    "entropy": ScoreRequest("teacher", top_k=3, entropy=True, hidden=True),
}


@pytest.fixture
def both(pools: dict[str, TeacherPool], tiny_teacher: Path) -> Iterator[dict[str, TeacherPool]]:
    """Start the teacher of one rank once more, with two."""
    memory = Path("/dev/shm")
    before = set(memory.iterdir())
    split = start("split", tiny_teacher, "float32", num_replicas=1, tensor_parallel=2)
    split.wait_until_ready()
    yield {"exact": pools["exact"], "split": split}
    split.shutdown()
    for path in set(memory.glob("*-cpushm_*")) - before:  # vLLM leaves what its ranks exchanged on a CPU
        path.unlink()


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


def scored(pools: dict[str, TeacherPool], name: str, request: ScoreRequest) -> pa.RecordBatch:
    wire, handle = pack(make_batch(), {})
    router = TeacherRouter(pools, call_seconds=120)
    [answer] = router.score([replace(handle, reference=ray.put(wire))], lambda _: [(name, request)])
    return from_wire(ray.get(answer.reference), "scored")


def test_two_ranks_score_as_one(both: dict[str, TeacherPool]) -> None:
    for asked, request in REQUESTS.items():
        one, two = (scored(both, name, request) for name in ("exact", "split"))
        columns = [name for name in one.schema.names if name.startswith("teacher_") and "version" not in name]
        assert len(columns) == len(request.signals - {"candidate_ids"})
        for name in columns:
            values, others = (ragged(batch, name).values for batch in (one, two))
            assert len(values) == 60 + 50 + 40 + 30
            np.testing.assert_allclose(others, values, rtol=0, atol=1e-5, err_msg=f"{asked}: {name}")
        if request.top_k:
            assert np.array_equal(*(ragged(batch, "candidate_ids").values for batch in (one, two)))
