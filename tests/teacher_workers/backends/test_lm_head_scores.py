"""Scores from hidden states against a log-softmax over the whole vocabulary in fp64."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from cluster.contracts.errors import ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import Scores
from cluster.models.lm_head import LmHead
from teacher_workers.backends.lm_head_scores import FLOOR, MIN_CHUNK_TOKENS, predicting_rows, score_tokens

VOCABULARY, WIDTH = 70_000, 8  # so large that the smallest chunk applies
NUM_TOKENS = 2 * MIN_CHUNK_TOKENS + 5  # three chunks
NUM_CANDIDATES = 6


@pytest.fixture(scope="module")
def head() -> LmHead:
    return LmHead(torch.randn(VOCABULARY, WIDTH, generator=torch.manual_seed(0)))


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    return 0.3 * torch.randn(NUM_TOKENS, WIDTH, generator=torch.manual_seed(1))


@pytest.fixture(scope="module")
def expected(head: LmHead, hidden: torch.Tensor) -> torch.Tensor:
    return (hidden.double() @ head.weight.double().T).log_softmax(-1)  # [tokens, vocabulary]


def score(head: LmHead, states: torch.Tensor, **asked: Any) -> tuple[Scores, np.ndarray, np.ndarray]:
    """Score random tokens and candidates; returns them too."""
    draw = np.random.default_rng(2)
    written = draw.integers(0, head.vocabulary_size, len(states), dtype=np.int32)
    candidates = draw.integers(0, head.vocabulary_size, (len(states), NUM_CANDIDATES), dtype=np.int32)
    request = ScoreRequest("teacher", **asked)
    given = candidates if request.given_candidates else None
    return score_tokens(head, states, written, request, given), written, candidates


def gather(expected: torch.Tensor, ids: np.ndarray) -> np.ndarray:
    return expected.gather(1, torch.from_numpy(ids.astype(np.int64))).numpy()


def test_written_tokens_get_their_log_softmax(head: LmHead, hidden: torch.Tensor, expected: torch.Tensor) -> None:
    scores, written, _ = score(head, hidden)
    assert scores["logprobs"].dtype == np.float32
    # float32 numbers near -12 are 1e-6 apart.
    np.testing.assert_allclose(scores["logprobs"], gather(expected, written[:, None])[:, 0], rtol=2e-7, atol=1e-6)
    assert list(scores) == ["logprobs"]


def test_given_candidates_get_their_log_softmax(head: LmHead, hidden: torch.Tensor, expected: torch.Tensor) -> None:
    scores, _, candidates = score(head, hidden, given_candidates=True)
    assert "candidate_ids" not in scores
    np.testing.assert_allclose(scores["candidate_logprobs"], gather(expected, candidates), rtol=2e-7, atol=1e-6)


def test_chosen_candidates_are_the_most_likely_first(
    head: LmHead, hidden: torch.Tensor, expected: torch.Tensor
) -> None:
    scores, _, _ = score(head, hidden, top_k=NUM_CANDIDATES)
    best, best_ids = expected.topk(NUM_CANDIDATES)
    assert scores["candidate_ids"].dtype == np.int32
    assert (scores["candidate_ids"] == best_ids.numpy()).all()
    np.testing.assert_allclose(scores["candidate_logprobs"], best.numpy(), rtol=2e-7, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 3])
def test_entropy_is_that_of_the_whole_distribution(
    top_k: int, head: LmHead, hidden: torch.Tensor, expected: torch.Tensor
) -> None:
    scores, written, _ = score(head, hidden, entropy=True, top_k=top_k)
    entropy = -(expected.exp() * expected).sum(-1)
    np.testing.assert_allclose(scores["entropy"], entropy.numpy(), rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(scores["logprobs"], gather(expected, written[:, None])[:, 0], rtol=2e-7, atol=1e-6)


def test_the_entropy_of_equal_logits_is_the_log_of_the_vocabulary() -> None:
    scores, _, _ = score(LmHead(torch.ones(10, WIDTH)), torch.ones(2, WIDTH), entropy=True)
    assert scores["entropy"] == pytest.approx(np.log([10, 10]), abs=1e-6)


def test_logits_far_from_0_stay_finite() -> None:
    head = LmHead(torch.tensor([[1.0], [0.0], [-1.0]]))
    scores = score_tokens(head, torch.tensor([[3000.0]]), np.array([1], np.int32), ScoreRequest("t", 2, entropy=True))
    assert scores["logprobs"].tolist() == [-3000.0]
    assert scores["entropy"].tolist() == [0.0]
    assert scores["candidate_logprobs"].tolist() == [[0.0, -3000.0]]


@pytest.mark.parametrize("asked", [{"top_k": NUM_CANDIDATES}, {"top_k": NUM_CANDIDATES, "entropy": True}, {}])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_a_small_tail_is_what_the_candidates_leave(asked: dict[str, Any], shift: float) -> None:
    """5e-5 of the mass outside the candidates; a sum of logarithms, or a plain one beside 1, is off by percents."""
    logits = torch.randn(8, VOCABULARY, generator=torch.manual_seed(3)) + shift
    logits[torch.arange(8), torch.arange(8) * 9001] = 21.5 + shift
    ids = logits.topk(NUM_CANDIDATES).indices
    request = ScoreRequest("teacher", given_candidates=not asked, **asked)
    scores = score_tokens(LmHead(logits.T.contiguous()), torch.eye(8), ids[:, 0].int().numpy(), request, ids.numpy())
    tail = 1 - np.exp(scores["candidate_logprobs"].astype(np.float64)).sum(-1)
    exact = 1 - logits.double().softmax(-1).gather(-1, ids).sum(-1)
    assert exact.max() < 1e-4
    np.testing.assert_allclose(tail, exact.numpy(), rtol=4e-3)  # float32 probabilities of 1 are 6e-8 apart


def test_ids_that_the_teacher_does_not_have_get_the_floor() -> None:
    head = LmHead(torch.zeros(4, 2))
    candidates = np.array([[3, 4], [9, 0]], np.int32)
    request = ScoreRequest("teacher", given_candidates=True)
    scores = score_tokens(head, torch.zeros(2, 2), np.array([4, 3], np.int32), request, candidates)
    even = pytest.approx(-np.log(4))
    assert scores["logprobs"].tolist() == [FLOOR, even]
    assert scores["candidate_logprobs"].tolist() == [[even, FLOOR], [FLOOR, even]]


def test_excluded_ids_are_never_chosen_and_their_probability_goes_to_the_others() -> None:
    """Of probabilities 1/2, 1/4, 1/8, 1/8 the first is excluded, as a token is that the student lacks."""
    head = LmHead(torch.tensor([[4.0], [2.0], [1.0], [1.0]]).log(), excluded_ids=torch.tensor([0]))
    request, written = ScoreRequest("teacher", top_k=2, entropy=True), np.array([1, 0], np.int32)
    scores = score_tokens(head, torch.ones(2, 1), written, request)
    assert scores["logprobs"].tolist() == [pytest.approx(np.log(1 / 2)), FLOOR]
    assert scores["candidate_ids"][:, 0].tolist() == [1, 1]
    assert 0 not in scores["candidate_ids"]
    assert scores["candidate_logprobs"][0].tolist() == pytest.approx(np.log([1 / 2, 1 / 4]))
    assert scores["entropy"].tolist() == [pytest.approx(1.5 * np.log(2))] * 2
    whole = score_tokens(LmHead(head.weight[1:]), torch.ones(1, 1), np.array([0], np.int32), ScoreRequest("teacher"))
    assert whole["logprobs"].tolist() == [pytest.approx(np.log(1 / 2))]


def test_no_completion_token_gives_columns_of_no_rows() -> None:
    scores, _, _ = score(LmHead(torch.ones(10, WIDTH)), torch.ones(0, WIDTH), top_k=3, entropy=True, hidden=True)
    assert scores["logprobs"].shape == (0,)
    assert scores["candidate_ids"].shape == (0, 3)
    assert scores["entropy"].shape == (0,)
    assert scores["hidden"].shape == (0, WIDTH)


def test_hidden_states_travel_in_the_teachers_own_dtype() -> None:
    values = torch.tensor([[1.0, -2.5]])
    head = LmHead(torch.ones(10, 2, dtype=torch.bfloat16))
    scores, _, _ = score(head, values.bfloat16(), hidden=True)
    assert scores["hidden"].dtype == np.uint16
    # bfloat16 is the upper half of float32: 1.0 is 0x3F800000, -2.5 is 0xC0200000.
    assert scores["hidden"].tolist() == [[0x3F80, 0xC020]]
    scores, _, _ = score(LmHead(torch.ones(10, 2)), values, hidden=True)
    assert scores["hidden"].dtype == np.float32
    assert scores["hidden"].tolist() == [[1.0, -2.5]]


def test_a_token_is_predicted_by_the_position_before_it() -> None:
    hidden = torch.arange(6.0).unsqueeze(-1)
    assert predicting_rows(hidden, np.array([0, 0, 1, 0, 1, 1], np.uint8)).flatten().tolist() == [1, 3, 4]
    assert predicting_rows(hidden, np.zeros(6, np.uint8)).shape == (0, 1)
    assert predicting_rows(hidden[2:], np.array([0, 0, 0, 1, 0, 1], np.uint8), num_cached=2).flatten().tolist() == [
        2,
        4,
    ]


def test_another_number_of_hidden_states_than_tokens_is_refused() -> None:
    with pytest.raises(ScoreError, match="5 hidden states for 6 tokens"):
        predicting_rows(torch.zeros(5, 1), np.array([0, 0, 1, 1, 1, 1], np.uint8))


@pytest.mark.parametrize("asked", [{"given_candidates": True}, {"top_k": NUM_CANDIDATES}])
def test_ids_that_end_completions_are_scored_as_one(
    asked: dict[str, Any], head: LmHead, hidden: torch.Tensor, expected: torch.Tensor
) -> None:
    """Ids 11, 3 and 5; the last has no probability, for it was excluded by name."""
    merged = replace(head, stop_class=(11, 3, 5), excluded_ids=torch.tensor([5]))
    written = np.resize(np.array([3, 11, 8], np.int32), NUM_TOKENS)
    candidates = np.resize(np.array([8, 3, 2], np.int32), (NUM_TOKENS, 3))
    request = ScoreRequest("teacher", entropy=True, **asked)
    scores = score_tokens(merged, hidden, written, request, candidates if request.given_candidates else None)
    kept = expected - torch.log1p(-expected[:, [5]].exp())
    kept[:, 5] = -1e4
    kept[:, 11] = torch.logaddexp(kept[:, 11], kept[:, 3])
    kept[:, 3] = -1e4
    stands_for = np.where(written == 3, 11, written)
    np.testing.assert_allclose(scores["logprobs"], gather(kept, stands_for[:, None])[:, 0], rtol=2e-7, atol=2e-6)
    np.testing.assert_allclose(scores["entropy"], -(kept.exp() * kept).sum(-1).numpy(), rtol=1e-6, atol=2e-6)
    if request.top_k:
        np.testing.assert_array_equal(scores["candidate_ids"], kept.topk(NUM_CANDIDATES).indices.numpy())
        assert not np.isin(scores["candidate_ids"], [3, 5]).any()
    else:
        of_candidates = gather(kept, np.where(candidates == 3, 11, candidates))
        np.testing.assert_allclose(scores["candidate_logprobs"], of_candidates, rtol=2e-7, atol=2e-6)
