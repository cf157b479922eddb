"""Scores from hidden states against a log-softmax over the whole vocabulary in fp64."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import FLOOR, Scores
from cluster.models.lm_head import LmHead
from cluster.models.token_scores import (
    MIN_CHUNK_TOKENS,
    HeadShard,
    Layout,
    largest_logits,
    rows_of_rank,
    score_positions,
    score_tokens,
)

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


def of_ranks(head: LmHead, num_ranks: int, score_with: Callable[[HeadShard], torch.Tensor]) -> list[torch.Tensor]:
    """Return what every rank gets, each with its part of the head, in a thread of its own."""
    sent: list[torch.Tensor] = [torch.empty(0)] * num_ranks
    barrier = Barrier(num_ranks, timeout=60)

    def on(rank: int) -> torch.Tensor:
        def gather(values: torch.Tensor) -> torch.Tensor:
            sent[rank] = values
            barrier.wait()
            together = torch.cat(sent, dim=-1)
            barrier.wait()
            return together

        first, last = rows_of_rank(head.vocabulary_size, rank, num_ranks)
        bias = None if head.bias is None else head.bias[first:last]
        own = replace(head, weight=head.weight[first:last], bias=bias)
        shard = HeadShard.of(own, first, head.vocabulary_size, gather)
        return score_with(replace(shard, shared=shared_of(head)[first:last]))

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(on, range(num_ranks)))


def shared_of(head: LmHead) -> torch.Tensor:
    return (torch.arange(head.vocabulary_size) % 3 > 0).float()


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("given", [0, 4])
def test_ranks_with_parts_of_the_head_say_together_what_one_with_all_of_it_does(num_ranks: int, given: int) -> None:
    """The head has all that a head can have; its stop class and its excluded ids lie in the parts of several ranks."""
    draw = torch.manual_seed(4)
    size, num_tokens = 1024, MIN_CHUNK_TOKENS + 7
    head = LmHead(
        torch.randn(size, WIDTH, generator=draw),
        bias=torch.randn(size, generator=draw),
        logit_factor=1.7,
        softcap=9.0,
        excluded_ids=torch.tensor([2, 700]),
        stop_class=(900, 5, 400),
    )
    hidden, layers = torch.randn(num_tokens, WIDTH, generator=draw), torch.randn(num_tokens, 3, generator=draw)
    ids = torch.randint(0, size + 9, (num_tokens, 1 + given), generator=draw)
    ids[:4, 0] = torch.tensor([5, 900, 2, size])
    layout = Layout(given, 0 if given else 6, entropy=True, shared_mass=True, hidden=True, layers=True)

    def score_with(shard: HeadShard) -> torch.Tensor:
        with torch.inference_mode():
            return score_positions(shard, hidden, layers, ids, layout)

    dtype = layout.dtype("<f4", WIDTH, 3)
    whole = score_with(replace(HeadShard.of(head), shared=shared_of(head))).numpy().reshape(-1).view(dtype)
    for records in of_ranks(head, num_ranks, score_with):
        found = records.numpy().reshape(-1).view(dtype)
        for name in dtype.names or ():
            if name == "candidate_ids":
                np.testing.assert_array_equal(found[name], whole[name])
            else:
                np.testing.assert_allclose(found[name], whole[name], rtol=1e-6, atol=2e-6)


def test_a_record_has_the_probability_of_all_shared_tokens() -> None:
    head = LmHead(torch.tensor([[8.0], [4.0], [2.0], [1.0], [1.0]]).log())  # probabilities 1/2, 1/4, 1/8, 1/16, 1/16
    shard = replace(HeadShard.of(head), shared=torch.tensor([1.0, 0, 0, 1, 1]))
    records = score_positions(
        shard, torch.ones(2, 1), torch.empty(2, 0), torch.zeros(2, 1), Layout(shared_mass=True, entropy=True)
    )
    assert records.view(torch.float32)[:, 2].tolist() == pytest.approx([0.625, 0.625])


@pytest.mark.parametrize(
    ("size", "k"), [(512, 3), (640, 5), (320, 3), (100, 4), (112, 1), (112, 16), (112, 112), (2048, 64), (2049, 65)]
)
def test_the_largest_logits_are_found_by_groups_or_by_sorting_as_topk_finds_them(size: int, k: int) -> None:
    logits = torch.randperm(7 * size, generator=torch.manual_seed(size)).float().view(7, size) / 3 - size
    values, places = largest_logits(logits, k)
    expected, expected_places = logits.topk(k)
    assert torch.equal(values, expected)
    assert torch.equal(places, expected_places)


def test_sorted_logits_keep_every_bit_and_equal_ones_have_a_place_each() -> None:
    tiny, next_up = 1e-42, float(np.nextafter(np.float32(2.0), np.float32(3.0)))
    logits = torch.tensor([[-0.0, 2.0, next_up, -tiny, tiny, 2.0, -1e6, -3.5, 0.0]])
    values, places = largest_logits(logits, 9)
    assert values[0, :3].tolist() == [next_up, 2.0, 2.0]
    assert sorted(places[0, 1:3].tolist()) == [1, 5]
    assert torch.equal(values, logits.sort(descending=True).values)
    assert sorted(places[0].tolist()) == list(range(9))
