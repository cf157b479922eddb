"""The teacher worker on an engine that says what it is told."""

import asyncio
import math

import numpy as np
import pytest
import torch

from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Bytes, Ints, make_generated, models_in, ragged
from cluster.models.lm_head import LmHead
from teacher_workers.actor import TeacherWorker
from tests.builders import make_trajectory
from tests.teacher_workers.hidden_states import HiddenStatesBackend

VOCABULARY = 112
HALF_3_QUARTER_5 = torch.full((VOCABULARY,), 0.25 / (VOCABULARY - 2)).index_fill(0, torch.tensor([3]), 0.5)
HALF_3_QUARTER_5[5] = 0.25


class ScriptedEngine(HiddenStatesBackend):
    """Gives every completion token the same hidden state, which the worker's head takes for the logits."""

    def __init__(self, hidden: torch.Tensor, layers_width: int = 0) -> None:
        super().__init__(LmHead(torch.eye(VOCABULARY)), layers_width)
        self._hidden = hidden

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        return self._hidden.expand(int(loss_mask.sum()), VOCABULARY), 1


def make_worker(probabilities: torch.Tensor) -> TeacherWorker:
    return TeacherWorker("teacher-math-1", ScriptedEngine(probabilities.log()))


BATCH = make_generated([make_trajectory(completion=[3, 5]), make_trajectory(completion=[5, 3, 5])])
TEACHER, BASE = ScoreRequest("teacher"), ScoreRequest("base")


def test_scores_are_added_row_by_row_and_counted() -> None:
    scored, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(BATCH, TEACHER))
    half, quarter = pytest.approx(math.log(0.5)), pytest.approx(math.log(0.25))
    assert ragged(scored, "teacher_logprobs")[0].tolist() == [half, quarter]
    assert ragged(scored, "teacher_logprobs")[1].tolist() == [quarter, half, quarter]
    values = report(metrics)
    assert values["teacher/tokens"] == 9  # two prompt tokens per row
    assert values["teacher/scored_tokens"] == 5
    assert values["teacher/prefix_hit_ratio"] == pytest.approx(2 / 9)  # one token per row was there already
    assert values["teacher/logprob"] == pytest.approx((2 * math.log(0.5) + 3 * math.log(0.25)) / 5)
    assert values["teacher/sampled_kl"] == pytest.approx(3 / 5 * math.log(2))  # the student gave every token one half


def test_rows_of_a_privileged_sampler_say_nothing_of_the_students_distance() -> None:
    """The student's row has two tokens, of one half and one quarter; the sampler's row three."""
    rows = [make_trajectory(completion=[3, 5]), make_trajectory(completion=[5, 5, 5], sampler="privileged:student")]
    _, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(make_generated(rows), TEACHER))
    assert report(metrics)["teacher/sampled_kl"] == pytest.approx(math.log(2) / 2)
    _, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(make_generated(rows[1:]), TEACHER))
    assert "teacher/sampled_kl" not in metrics
    assert report(metrics)["teacher/scored_tokens"] == 3


def test_how_far_the_teacher_is_from_the_ends_of_what_was_cut_off_is_said_by_itself() -> None:
    """The last quarter of the second row alone: two tokens of one quarter; all others are of one half."""
    completion = [3] * 6 + [5] * 2
    rows = [make_trajectory(completion=completion), make_trajectory(completion=completion, finish_reason="length")]
    _, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(make_generated(rows), TEACHER))
    values = report(metrics)
    assert values["teacher/log_ratio"] == pytest.approx(4 / 16 * math.log(2))
    assert values["teacher/cut_tail_log_ratio"] == pytest.approx(math.log(2))
    _, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(make_generated(rows[:1]), TEACHER))
    assert "teacher/cut_tail_log_ratio" not in report(metrics)


def test_a_second_model_scores_what_the_first_one_chose() -> None:
    worker = make_worker(HALF_3_QUARTER_5)
    first, _ = asyncio.run(worker.score(BATCH, ScoreRequest("teacher", top_k=2)))
    second, metrics = asyncio.run(worker.score(first, ScoreRequest("base", given_candidates=True)))
    assert models_in(second.schema) == ["teacher", "base"]
    assert ragged(second, "candidate_ids")[0].tolist() == [[3, 5], [3, 5]]
    assert ragged(second, "base_candidate_logprobs")[0] == pytest.approx(np.log([[0.5, 0.25]] * 2))
    names = sorted(name.removeprefix("base/") for name in metrics)
    assert names == ["logprob", "prefix_hit_ratio", "scored_tokens", "seconds", "tokens"]


class EngineWithLayers(ScriptedEngine):
    """Gives the values of other layers behind each hidden state, which counts the tokens of its row."""

    def __init__(self, hidden: torch.Tensor, layers: torch.Tensor) -> None:
        super().__init__(hidden, layers.shape[-1])
        self._layers = layers

    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[torch.Tensor, int]:
        hidden, cached = await super().hidden_states(request_id, token_ids, loss_mask)
        count = torch.arange(len(hidden))[:, None]
        return torch.cat([hidden, self._layers + count], dim=-1), cached


def test_values_of_other_layers_are_a_column_of_their_own_and_no_score_reads_them() -> None:
    engine = EngineWithLayers(HALF_3_QUARTER_5.log(), torch.tensor([7.0, 8.0, 9.0]))
    worker, plain = TeacherWorker("teacher", engine), make_worker(HALF_3_QUARTER_5)
    request = ScoreRequest("teacher", hidden=True, layers=True)
    scored, _ = asyncio.run(worker.score(BATCH, request))
    alone, _ = asyncio.run(plain.score(BATCH, ScoreRequest("teacher", hidden=True)))
    assert ragged(scored, "teacher_layers")[1].tolist() == [[7, 8, 9], [8, 9, 10], [9, 10, 11]]
    for name in ("teacher_logprobs", "teacher_hidden"):
        assert ragged(scored, name).values.tolist() == ragged(alone, name).values.tolist()
    without, _ = asyncio.run(worker.score(BATCH, TEACHER))
    assert "teacher_layers" not in without.schema.names


def test_candidates_that_nobody_chose_cannot_be_scored() -> None:
    with pytest.raises(ScoreError, match=r"^teacher-math-1: base is to score candidates, but the batch has none"):
        asyncio.run(make_worker(HALF_3_QUARTER_5).score(BATCH, ScoreRequest("base", given_candidates=True)))


def test_rows_without_completion_are_scored_with_nothing() -> None:
    batch = make_generated([make_trajectory(completion=[]), make_trajectory(completion=[])])
    scored, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(batch, TEACHER))
    assert ragged(scored, "teacher_logprobs").lengths.tolist() == [0, 0]
    assert report(metrics)["teacher/scored_tokens"] == 0


def test_nan_is_refused_and_the_error_names_teacher_and_replica() -> None:
    with pytest.raises(ScoreError, match=r"^teacher-math-1: .*NaN"):
        asyncio.run(make_worker(HALF_3_QUARTER_5 * math.nan).score(BATCH, TEACHER))


def test_uniform_scores_are_refused() -> None:
    with pytest.raises(ScoreError, match=r"^teacher-math-1: all 5 tokens were scored -4\.7185"):
        asyncio.run(make_worker(torch.ones(VOCABULARY)).score(BATCH, BASE))


def test_equal_scores_of_another_value_pass() -> None:
    batch = make_generated([make_trajectory(completion=[5, 5, 5])])
    assert asyncio.run(make_worker(HALF_3_QUARTER_5).score(batch, TEACHER))[0].num_rows == 1


def test_one_token_may_be_scored_uniformly_by_chance() -> None:
    batch = make_generated([make_trajectory(completion=[3])])
    assert asyncio.run(make_worker(torch.ones(VOCABULARY)).score(batch, TEACHER))[0].num_rows == 1


def test_two_sampled_spans_of_a_row_are_scored_and_what_stands_between_them_is_not() -> None:
    mask = np.array([0, 1, 0, 0, 1, 1], np.uint8)
    tokens = np.array([1, 3, 9, 9, 5, 3], np.int32)
    row = make_trajectory(token_ids=tokens, loss_mask=mask, rollout_logprobs=np.full(3, -1, np.float32))
    scored, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(make_generated([row]), TEACHER))
    half, quarter = pytest.approx(math.log(0.5)), pytest.approx(math.log(0.25))
    assert ragged(scored, "teacher_logprobs")[0].tolist() == [half, quarter, half]
    assert report(metrics)["teacher/scored_tokens"] == 3


def test_a_row_without_sampled_tokens_is_not_read_and_shifts_no_score() -> None:
    rows = [make_trajectory(completion=ids, trajectory_id=row) for row, ids in enumerate([[3, 5], [], [5]])]
    scored, metrics = asyncio.run(make_worker(HALF_3_QUARTER_5).score(make_generated(rows), TEACHER))
    logprobs = ragged(scored, "teacher_logprobs")
    assert [np.exp(logprobs[row]).round(5).tolist() for row in range(3)] == [[0.5, 0.25], [], [0.25]]
    assert report(metrics)["teacher/prefix_hit_ratio"] == pytest.approx(2 / 9)  # one token of each row that is read
