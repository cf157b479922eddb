"""Two real vLLM teacher replicas against transformers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from cluster.batch_store import pack
from cluster.contracts.errors import ScoreError
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.trajectory import from_wire, make_generated, ragged
from teacher_workers.pool import TeacherPool, TeacherPools
from tests.builders import make_trajectory
from tests.tiny_qwen3 import TEACHER_TOP_K, expected_logprobs, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engines to start


def make_handle(first_id: int, num_rows: int = 2, teacher: str = "even") -> BatchHandle:
    draw = np.random.default_rng(first_id)
    rows = [
        make_trajectory(
            prompt=draw.integers(4, 112, 5 + row),
            completion=draw.integers(4, 112, 20 + 10 * row),
            trajectory_id=first_id + row,
            teacher=teacher,
        )
        for row in range(num_rows)
    ]
    wire, handle = pack(make_generated(rows), {})
    return replace(handle, reference=ray.put(wire))


def test_every_batch_is_scored_once_and_equals_transformers(teacher_pool: TeacherPool, teacher_folder: Path) -> None:
    model = load(teacher_folder)
    pools = TeacherPools({"even": teacher_pool}, call_seconds=60)
    handles = list(pools.score(make_handle(10 * index) for index in range(6)))
    assert sorted(handle.trajectory_ids for handle in handles) == [(10 * i, 10 * i + 1) for i in range(6)]
    num_outside = 0
    for handle in handles:
        batch = from_wire(ray.get(handle.reference), "scored")
        for row in range(batch.num_rows):
            token_ids = ragged(batch, "token_ids")[row]
            sampled = np.flatnonzero(ragged(batch, "loss_mask")[row])
            expected = expected_logprobs(model, token_ids.tolist())[sampled - 1]  # [completion_tokens, vocabulary]
            own = ragged(batch, "teacher_logprobs")[row]
            assert np.abs(own - expected[np.arange(len(sampled)), token_ids[sampled]].numpy()).max() < 1e-4
            best, best_ids = expected.topk(TEACHER_TOP_K)
            assert np.abs(ragged(batch, "teacher_topk_logprobs")[row] - best.numpy()).max() < 1e-4
            ids = torch.from_numpy(ragged(batch, "teacher_topk_ids")[row].astype(np.int64))
            assert (expected.gather(1, ids) - best).abs().max() < 1e-4  # the same ids, up to ties
            num_outside += int((ids != torch.from_numpy(token_ids[sampled])[:, None]).all(dim=1).sum())
            assert best_ids.shape == ids.shape
    assert num_outside > 0  # random tokens: most are not among the best 8 of 112


def test_a_batch_for_an_unknown_teacher_is_refused(teacher_pool: TeacherPool) -> None:
    pools = TeacherPools({"even": teacher_pool}, call_seconds=60)
    with pytest.raises(ScoreError, match="names the teacher 'odd'"):
        list(pools.score([make_handle(0, teacher="odd")]))
