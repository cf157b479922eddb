"""What finished batches teach of the next ones, and how requests are dealt by it."""

from collections.abc import Mapping

import pytest

from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import RolloutRequest
from rollout_workers.scheduling import PROMPT_MEMORY, Average, ExpectedLengths, spread


def finished(lengths: Mapping[int, int]) -> BatchHandle:
    """Return the handle of a batch with one completion per prompt id, of so many tokens."""
    tokens = tuple(lengths.values())
    return BatchHandle(None, "main", tuple(lengths), tokens, tokens, prompt_ids=tuple(lengths))


def by_tens(prompt_id: int) -> str:
    return f"domain {prompt_id // 10}"


def dealt(lengths: Mapping[int, float], num_workers: int, samples: int = 1) -> list[list[int]]:
    """Return each worker's prompt ids."""
    requests = [RolloutRequest(0, prompt_id, sample, 0) for prompt_id in lengths for sample in range(samples)]
    shares = spread(requests, num_workers, lengths.__getitem__)
    return [[request.prompt_id for request in share] for share in shares]


def test_a_prompt_is_expected_as_its_own_completions_were_then_as_its_domains_then_as_all() -> None:
    lengths = ExpectedLengths(by_tens)
    lengths.observe(finished({1: 10, 2: 30, 11: 100}))
    assert lengths.expect(1) == 10
    assert lengths.expect(3) == 20  # domain 0
    assert lengths.expect(12) == 100  # domain 1
    assert lengths.expect(99) == pytest.approx(140 / 3)


def test_before_any_batch_all_prompts_are_expected_alike() -> None:
    lengths = ExpectedLengths(by_tens)
    assert lengths.expect(1) == lengths.expect(11) > 0


def test_an_average_begins_as_the_mean_and_then_forgets() -> None:
    average = Average()
    for value in (2, 4, 6):
        average.add(value, memory=3)
    assert average.value == 4
    average.add(7, memory=3)
    assert average.value == 5  # 4 + (7 - 4) / 3


def test_a_prompt_that_grew_longer_is_soon_expected_to_be_long() -> None:
    lengths = ExpectedLengths(by_tens)
    for tokens in [10] * 100 + [1000] * (2 * PROMPT_MEMORY):
        lengths.observe(finished({1: tokens}))
    assert lengths.expect(1) > 850  # of the old value (1 - 1/8)^16 = 0.12 is left
    assert lengths.expect(2) < 200  # (100 x 10 + 16 x 1000) / 116 = 147: its domain remembers all of them


def test_the_longest_are_dealt_first_and_every_worker_has_as_many_tokens() -> None:
    assert dealt({0: 10, 1: 20, 2: 50, 3: 10}, 2) == [[2], [1, 0, 3]]  # 50 and 40 tokens; by count: 60 and 30


def test_the_samples_of_a_prompt_stay_together_and_count_together() -> None:
    assert dealt({0: 10, 1: 30, 2: 20}, 2, samples=2) == [[1, 1], [2, 2, 0, 0]]


def test_requests_of_equal_expectation_are_spread_evenly_in_their_order() -> None:
    assert dealt(dict.fromkeys(range(4), 1.0), 2, samples=3) == [[0, 0, 0, 2, 2, 2], [1, 1, 1, 3, 3, 3]]


def test_a_worker_may_have_nothing_to_do() -> None:
    assert dealt({5: 1}, 3) == [[5], [], []]
