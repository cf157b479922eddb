"""Analytic full-vocabulary divergences against autograd on the plain definitions."""

import pytest
import torch
from torch import Tensor

from learner.loss.divergences import BUCKET_DIVERGENCES
from learner.loss.exact import EXACT_DIVERGENCES, Distribution, Spare
from tests.learner.loss.builders import random_logprobs

NAMES = sorted(EXACT_DIVERGENCES)


def exact(name: str, logits: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Return losses and the gradient by the logits."""
    logprobs = logits.log_softmax(-1)
    spare = Spare(torch.full_like(logits, 7.0), torch.full_like(logits, 7.0))
    return EXACT_DIVERGENCES[name](Distribution(logprobs, logprobs.exp()), target.clone(), spare, parameter)


def test_the_same_divergences_exist_over_buckets_and_over_the_vocabulary() -> None:
    assert sorted(BUCKET_DIVERGENCES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_values_and_gradients_are_those_of_autograd(name: str, parameter: float) -> None:
    target = random_logprobs(6, 40, seed=0)
    logits = random_logprobs(6, 40, seed=1).requires_grad_()
    expected = BUCKET_DIVERGENCES[name](logits.log_softmax(-1), target, parameter)
    (gradient,) = torch.autograd.grad(expected.sum() + 0 * logits.sum(), logits)
    losses, found = exact(name, logits.detach(), target, parameter)
    torch.testing.assert_close(losses, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_value_and_gradient_are_zero_where_student_and_target_agree(name: str, scale: float) -> None:
    logprobs = random_logprobs(8, 5000, seed=2, scale=scale, dtype=torch.float32).clamp(min=-87)
    losses, gradient = exact(name, logprobs, logprobs, 0.3)
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_distributions_that_share_no_token_give_finite_values_and_gradients(name: str) -> None:
    """TRL, TestChunkedDivergenceLoss: a Jensen-Shannon mixture must not underflow where both have next to nothing."""
    student, target = torch.full((1, 2053), -87.0), torch.full((1, 2053), -87.0)
    student[0, 3], target[0, 2050] = 0.0, 0.0
    losses, gradient = exact(name, student, target, 0.5)
    assert losses.isfinite().all()
    assert losses.item() > 0.1
    assert gradient.isfinite().all()
