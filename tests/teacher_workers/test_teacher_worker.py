"""The teacher worker on an engine that says what it is told."""

import asyncio
import math

import numpy as np
import pytest

from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import report
from cluster.contracts.trajectory import Bytes, Ints, TeacherScores, make_generated, ragged
from teacher_workers.pool import least_loaded
from teacher_workers.worker import TeacherWorker
from tests.builders import make_trajectory

VOCABULARY = 112


class ScriptedEngine:
    """Gives every sampled token the next of the given log-probabilities, in a circle."""

    def __init__(self, *logprobs: float) -> None:
        self._logprobs = logprobs

    async def score(self, request_id: str, token_ids: Ints, loss_mask: Bytes, top_k: int) -> TeacherScores:
        return TeacherScores(np.resize(np.array(self._logprobs, np.float32), int(loss_mask.sum())))

    async def shutdown(self) -> None:
        """End nothing."""


def make_worker(*logprobs: float) -> TeacherWorker:
    return TeacherWorker("teacher-math-1", ScriptedEngine(*logprobs), VOCABULARY, top_k=0)


BATCH = make_generated([make_trajectory(completion=[3, 4]), make_trajectory(completion=[5, 6, 7])])


def test_scores_are_added_row_by_row_and_counted() -> None:
    scored, metrics = asyncio.run(make_worker(-1.0, -2.0).score(BATCH))
    assert ragged(scored, "teacher_logprobs")[0].tolist() == [-1.0, -2.0]
    assert ragged(scored, "teacher_logprobs")[1].tolist() == [-1.0, -2.0, -1.0]
    values = report(metrics)
    assert values["teacher/tokens"] == 9  # two prompt tokens per row
    assert values["teacher/scored_tokens"] == 5
    assert values["teacher/logprob"] == pytest.approx(-7 / 5)


def test_nan_is_refused_and_the_error_names_teacher_and_replica() -> None:
    with pytest.raises(ScoreError, match=r"^teacher-math-1: .*NaN"):
        asyncio.run(make_worker(-1.0, math.nan).score(BATCH))


def test_uniform_scores_are_refused() -> None:
    with pytest.raises(ScoreError, match=r"^teacher-math-1: all 5 tokens were scored -4\.7185"):
        asyncio.run(make_worker(-math.log(VOCABULARY)).score(BATCH))


def test_equal_scores_of_another_value_pass() -> None:
    scored, _ = asyncio.run(make_worker(-4.71).score(BATCH))
    assert scored.num_rows == 2


def test_one_token_may_be_scored_uniformly_by_chance() -> None:
    batch = make_generated([make_trajectory(completion=[3])])
    assert asyncio.run(make_worker(-math.log(VOCABULARY)).score(batch))[0].num_rows == 1


def test_the_replica_with_the_fewest_outstanding_tokens_is_next() -> None:
    assert least_loaded([300, 20, 100]) == 1
    assert least_loaded([5, 5]) == 0
