"""The passes over logits against torch's own."""

import math

import pytest
import torch

from learner.loss.softmax import CPU_BLOCK_ELEMENTS, kth_largest, read_tokens, softmax_of, temperature_normaliser
from tests.learner.loss.builders import entropy, random_logprobs, written

IDS = torch.tensor([[3, 8, 3], [0, 1, 2], [5, 5, 5], [8, 0, 4]])


@pytest.mark.parametrize("vocabulary", [9, CPU_BLOCK_ELEMENTS // 3, CPU_BLOCK_ELEMENTS + 1])
def test_probabilities_logprobs_and_entropy_are_those_of_torch(vocabulary: int) -> None:
    """Four rows: in one block, three and one, each in a block of its own."""
    logits = 3 + random_logprobs(4, vocabulary, seed=0)
    expected = logits.log_softmax(-1)
    found = softmax_of(logits, IDS)
    torch.testing.assert_close(found.logprobs, expected.gather(-1, IDS))
    torch.testing.assert_close(found.entropy, entropy(expected))
    torch.testing.assert_close(found.probabilities, expected.exp())
    assert found.probabilities.data_ptr() == logits.data_ptr()


def test_the_gradient_by_logits_is_that_of_autograd_with_repeated_ids() -> None:
    logits = random_logprobs(4, 9, seed=1).requires_grad_()
    by_logprobs = random_logprobs(4, 3, seed=2)
    (expected,) = torch.autograd.grad((logits.log_softmax(-1).gather(-1, IDS) * by_logprobs).sum(), logits)
    found = softmax_of(logits.detach().clone(), IDS).gradient(IDS, by_logprobs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("vocabulary", "k"), [(50, 7), (5000, 1), (5000, 20), (5003, 39), (300, 2), (10, 10)])
def test_the_kth_largest_is_that_of_a_sort(vocabulary: int, k: int) -> None:
    logits = random_logprobs(5, vocabulary, seed=3).round(decimals=1)  # with equal values
    expected = logits.sort(dim=-1, descending=True).values[:, k - 1]
    assert torch.equal(kth_largest(logits, k), expected)


def test_masked_logits_have_no_probability_and_a_finite_entropy() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0], [0.0, -50.0, -200.0]])
    found = softmax_of(logits.clone(), torch.tensor([[0, 1], [1, 2]]))
    assert found.logprobs.tolist() == [pytest.approx([-math.log(2), -80]), pytest.approx([-50, -80])]
    assert found.entropy.tolist() == pytest.approx([math.log(2), 0.0], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_read_in_float32(dtype: torch.dtype) -> None:
    logits = random_logprobs(4, 9, seed=4).to(dtype)
    ids = torch.tensor([3, 0, 5, 8])
    expected = logits.float().log_softmax(-1)
    logprobs, entropies = read_tokens(logits, ids)
    torch.testing.assert_close(logprobs, written(expected, ids))
    torch.testing.assert_close(entropies, entropy(expected))


@pytest.mark.parametrize("vocabulary", [9, CPU_BLOCK_ELEMENTS // 3])
def test_the_normaliser_of_a_temperature_makes_log_probabilities_those_of_it(vocabulary: int) -> None:
    logits = 50 + random_logprobs(4, vocabulary, seed=5)
    expected = (logits / 0.7).log_softmax(-1)
    found = logits.log_softmax(-1) / 0.7 - temperature_normaliser(logits, 0.7)[:, None]
    torch.testing.assert_close(found, expected)
    assert temperature_normaliser(logits, 1.0).tolist() == [0.0] * 4


def test_no_tokens_give_nothing() -> None:
    found = softmax_of(torch.empty(0, 9), torch.empty(0, 3, dtype=torch.long))
    assert (found.probabilities.shape, found.logprobs.shape, found.entropy.shape) == ((0, 9), (0, 3), (0,))
