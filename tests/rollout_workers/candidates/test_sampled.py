"""Draws from given logits and given random numbers, and what the log keeps of them."""

import numpy as np
import pytest
import torch

from rollout_workers.candidates.sampled import (
    GOLDEN_GAMMA,
    MAX_LOGITS_AT_ONCE,
    MAX_STEPS_ON_DEVICE,
    CandidateLog,
    CandidateRequest,
    LogitsRow,
    sample,
    scramble,
    uniforms,
)


def certain(*tokens: int, vocabulary: int = 10) -> torch.Tensor:
    """Return logits whose rows leave no other token than the given one."""
    logits = torch.full((len(tokens), vocabulary), -torch.inf)
    logits[range(len(tokens)), list(tokens)] = 0.0
    return logits


def ids_of(log: CandidateLog, key: str, num_tokens: int) -> list[list[int]]:
    taken = log.take(key, num_tokens)
    assert taken is not None
    assert taken[0].shape == taken[1].shape
    return [[int(token) for token in ids] for ids in taken[0]]


def test_the_random_numbers_are_those_of_the_published_splitmix64() -> None:
    # Rosetta Code, "Pseudo-random numbers/Splitmix64": the first three outputs for seed 1234567.
    states = np.uint64(1234567) + np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    assert scramble(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_a_uniform_number_depends_on_its_seed_position_and_place_alone() -> None:
    seeds, positions = np.array([5, 5, 6], np.uint64), np.array([0, 1, 0], np.uint64)
    together = uniforms(seeds, positions, 8)
    assert len(np.unique(together)) == 24
    for row in range(3):
        alone = uniforms(seeds[row : row + 1], positions[row : row + 1], 3)
        assert alone[0].tolist() == together[row, :3].tolist()


def test_candidates_invert_the_cumulative_distribution() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7.0  # a constant changes no probability
    ids, logprobs = sample(logits, torch.tensor([[0.0, 0.49, 0.51, 0.74, 0.76, 0.99]], dtype=torch.float64))
    assert ids.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert logprobs[0].exp().tolist() == pytest.approx([0.5, 0.5, 0.25, 0.25, 0.25, 0.25])


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    ids, logprobs = sample(certain(4), torch.tensor([[0.0, 0.5, 1 - 2.0**-52]], dtype=torch.float64))
    assert ids.tolist() == [[4, 4, 4]]
    assert logprobs.tolist() == [[0.0, 0.0, 0.0]]


def test_many_candidates_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.06, 0.05, 0.03, 0.01])
    num_draws = 100_000
    uniform = uniforms(np.arange(1000, dtype=np.uint64), np.full(1000, 17, np.uint64), 100)
    ids, _ = sample(probabilities.log().expand(1000, -1), torch.from_numpy(uniform))
    expected = num_draws * probabilities.double()
    chi_square = ((ids.flatten().bincount(minlength=8) - expected) ** 2 / expected).sum()
    assert chi_square < 7 + 5 * 14**0.5  # 8 - 1 degrees of freedom: mean 7, variance 14; five deviations


@pytest.mark.parametrize("vocabulary", [300, 5000, 9001])
def test_candidates_of_a_large_vocabulary_are_those_of_one_sum_over_all_of_it(vocabulary: int) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=random) * 4
    logits[:, torch.rand(vocabulary, generator=random) < 0.5] = -torch.inf
    logits[:, -90:] = -torch.inf  # the last block has none
    uniform = torch.rand(4, 50, generator=random, dtype=torch.float64)
    uniform[:, 0], uniform[:, 1] = 0.0, 1 - 2.0**-52
    places, temperatures = torch.tensor([5, 0, 3, 3]), torch.tensor([[0.5], [1.0], [2.0], [0.9]])
    ids, logprobs = sample(logits, uniform, places, temperatures)
    expected = (logits[places] / temperatures).double().log_softmax(-1)
    cumulative = expected.exp().cumsum(-1)
    passed = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    assert torch.equal(ids[:, 2:].long(), passed[:, 2:])
    torch.testing.assert_close(logprobs.double(), expected.gather(-1, ids.long()), atol=2e-6, rtol=1e-6)


def test_a_number_that_rounding_puts_behind_its_block_takes_the_last_token_that_is_possible() -> None:
    logits = torch.full((1, 5000), -torch.inf)
    logits[0, :70] = torch.linspace(0, 1e-3, 70)  # of blocks of 64 tokens, or 128
    numbers = torch.linspace(0, 1, 20_000, dtype=torch.float64).mul(1 - 2.0**-52)[None]
    ids, logprobs = sample(logits, numbers)
    assert ids.max() == 69
    assert logprobs.isfinite().all()


def test_no_number_draws_a_token_of_probability_zero_wherever_blocks_begin() -> None:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * 4
    logits[0, ::2] = -torch.inf  # the first of every block among them
    _, logprobs = sample(logits, torch.linspace(0, 1, 200_000, dtype=torch.float64).mul(1 - 2.0**-52)[None])
    assert logprobs.isfinite().all()


def test_a_position_that_is_computed_again_has_its_last_draws() -> None:
    log = CandidateLog()
    candidates = log.open(CandidateRequest("a", 2, seed=1))
    log.record([LogitsRow(candidates, 0, 0, 1.0)], certain(3))
    log.record([LogitsRow(candidates, 0, 1, 1.0)], certain(4))
    again = log.open(CandidateRequest("a", 2, seed=1))
    log.record([LogitsRow(again, 0, 1, 1.0)], certain(5))
    assert ids_of(log, "a", 2) == [[3, 3], [5, 5]]


def test_candidates_after_the_last_kept_token_are_cut_off() -> None:
    log = CandidateLog()
    candidates = log.open(CandidateRequest("a", 1, seed=1))
    for position, token in enumerate([3, 4, 5]):
        log.record([LogitsRow(candidates, 0, position, 1.0)], certain(token))
    assert ids_of(log, "a", 2) == [[3], [4]]


def test_candidates_end_before_a_position_that_was_never_drawn() -> None:
    log = CandidateLog()
    candidates = log.open(CandidateRequest("a", 1, seed=1))
    for position in (0, 2):
        log.record([LogitsRow(candidates, 0, position, 1.0)], certain(3))
    assert ids_of(log, "a", 3) == [[3]]


def test_candidates_that_already_left_the_device_are_found_with_the_rest() -> None:
    log = CandidateLog()
    candidates = log.open(CandidateRequest("a", 1, seed=1))
    for position in range(MAX_STEPS_ON_DEVICE + 3):
        log.record([LogitsRow(candidates, 0, position, 1.0)], certain(position % 10))
    assert ids_of(log, "a", 67) == [[position % 10] for position in range(67)]


def test_requests_that_want_different_numbers_of_candidates_share_a_step() -> None:
    log = CandidateLog()
    few, many = log.open(CandidateRequest("few", 1, seed=1)), log.open(CandidateRequest("many", 3, seed=2))
    log.record([LogitsRow(few, 1, 0, 1.0), LogitsRow(many, 0, 0, 1.0)], certain(8, 9))
    assert ids_of(log, "few", 1) == [[9]]
    assert ids_of(log, "many", 1) == [[8, 8, 8]]


def test_what_was_taken_or_given_up_is_forgotten() -> None:
    log = CandidateLog()
    for key in ("taken", "given up", "running"):
        log.open(CandidateRequest(key, 1, seed=1))
    log.take("taken", 0)
    log.drop(["given up", "never seen"])
    assert len(log) == 1
    assert log.take("taken", 0) is None


def test_logits_that_exceed_the_copy_are_drawn_from_in_parts() -> None:
    log = CandidateLog()
    vocabulary = MAX_LOGITS_AT_ONCE // 2
    rows = [LogitsRow(log.open(CandidateRequest(str(row), 1, seed=row)), row, 0, 1.0) for row in range(3)]
    log.record(rows, certain(11, vocabulary - 1, 0, vocabulary=vocabulary))
    assert [ids_of(log, str(row), 1) for row in range(3)] == [[[11]], [[vocabulary - 1]], [[0]]]
