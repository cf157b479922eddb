"""Which of vLLM's numbers belongs to which token; the flat form is written out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from cluster.contracts.errors import ScoreError
from teacher_workers.alignment import align

TOKENS = np.array([5, 6, 7, 8], np.int32)
MASK = np.array([0, 0, 1, 1], np.uint8)
# Position 0 has no entry. Position 1 is token 6, position 2 is token 7, position 3 is token 8: each is followed by the
# two most likely tokens there. Token 7 is the best of its position, token 8 is not among the best of its own.
TOP_TWO = SimpleNamespace(
    start_indices=[0, 0, 3, 6],
    end_indices=[0, 3, 6, 9],
    token_ids=[6, 6, 9, 7, 7, 4, 8, 1, 2],
    logprobs=[-0.1, -0.1, -3.0, -0.2, -0.2, -2.0, -9.0, -0.3, -1.5],
)
SAMPLED_ONLY = SimpleNamespace(
    start_indices=[0, 0, 1, 2], end_indices=[0, 1, 2, 3], token_ids=[6, 7, 8], logprobs=[-0.1, -0.2, -9.0]
)


def test_each_completion_token_gets_the_score_of_its_own_position() -> None:
    scores = align(SAMPLED_ONLY, TOKENS, MASK, top_k=0)
    assert scores.logprobs.tolist() == pytest.approx([-0.2, -9.0])
    assert scores.topk_ids is None


def test_a_sampled_token_is_scored_inside_and_outside_the_top_k() -> None:
    scores = align(TOP_TWO, TOKENS, MASK, top_k=2)
    assert scores.logprobs.tolist() == pytest.approx([-0.2, -9.0])
    assert scores.topk_ids is not None
    assert scores.topk_logprobs is not None
    assert scores.topk_ids.tolist() == [[7, 4], [1, 2]]
    assert scores.topk_logprobs.tolist() == [pytest.approx([-0.2, -2.0]), pytest.approx([-0.3, -1.5])]


def test_unmasked_positions_between_masked_ones_are_skipped() -> None:
    scores = align(SAMPLED_ONLY, TOKENS, np.array([0, 1, 0, 1], np.uint8), top_k=0)
    assert scores.logprobs.tolist() == pytest.approx([-0.1, -9.0])


def test_a_row_without_completion_has_no_scores() -> None:
    scores = align(TOP_TWO, TOKENS, np.zeros(4, np.uint8), top_k=2)
    assert scores.logprobs.shape == (0,)
    assert scores.topk_ids is not None
    assert scores.topk_ids.shape == (0, 2)


def test_positions_shifted_by_one_are_refused() -> None:
    with pytest.raises(ScoreError, match="shifted"):
        align(SAMPLED_ONLY, np.array([5, 5, 6, 7], np.int32), MASK, top_k=0)


def test_another_number_of_positions_is_refused() -> None:
    with pytest.raises(ScoreError, match="4 positions of 3 tokens"):
        align(SAMPLED_ONLY, TOKENS[:3], MASK[:3], top_k=0)


def test_another_number_of_entries_is_refused() -> None:
    with pytest.raises(ScoreError, match=r"\[3\] entries per position, expected 2"):
        align(TOP_TWO, TOKENS, MASK, top_k=1)
