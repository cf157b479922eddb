"""Analytic full-vocabulary divergences against autograd on the plain definitions."""

import pytest
import torch
from torch import Tensor

from learner.loss.divergences import DIVERGENCES
from tests.learner.loss.builders import divergence, random_logprobs

NAMES = sorted(DIVERGENCES)


def exact(name: str, logits: Tensor, target: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
    """Return losses and the gradient by the logits."""
    logprobs = logits.log_softmax(-1)
    return DIVERGENCES[name].exact(
        logprobs, logprobs.exp(), target.clone(), parameter, logits.new_full((2, *logits.shape), 7.0)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_values_and_gradients_are_those_of_autograd(name: str, parameter: float) -> None:
    target = random_logprobs(6, 40, seed=0)
    logits = random_logprobs(6, 40, seed=1).requires_grad_()
    expected = divergence(name, logits.log_softmax(-1), target, parameter)
    (gradient,) = torch.autograd.grad(expected.sum() + 0 * logits.sum(), logits)
    losses, found = exact(name, logits.detach(), target, parameter)
    torch.testing.assert_close(losses, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found, gradient, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_value_and_gradient_are_zero_where_student_and_target_agree(name: str, scale: float) -> None:
    logprobs = random_logprobs(8, 5000, seed=2, scale=scale, dtype=torch.float32).clamp(min=-80)
    losses, gradient = exact(name, logprobs, logprobs, 0.3)
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_distributions_that_share_no_token_give_finite_values_and_gradients(name: str) -> None:
    """TRL, TestChunkedDivergenceLoss: a Jensen-Shannon mixture must not underflow where both have next to nothing."""
    student, target = torch.full((1, 2053), -80.0), torch.full((1, 2053), -80.0)
    student[0, 3], target[0, 2050] = 0.0, 0.0
    losses, gradient = exact(name, student, target, 0.5)
    assert losses.isfinite().all()
    assert losses.item() > 0.1
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameter", [0.1, 0.5, 0.9])
def test_the_fast_form_is_phi_and_its_slope_by_autograd(name: str, parameter: float) -> None:
    """Slopes may differ by a constant: the gradient takes their mean off."""
    d = random_logprobs(6, 40, seed=3) - random_logprobs(6, 40, seed=4)
    divergence = DIVERGENCES[name]
    spare = d.new_full((2, *d.shape), 7.0)
    assert divergence.value_and_slope is not None
    value, slope = divergence.value_and_slope(d.clone(), parameter, spare)
    expected_value, expected_slope = divergence.by_autograd(d, parameter, spare)
    torch.testing.assert_close(value, expected_value, atol=1e-12, rtol=1e-12)
    difference = slope - expected_slope
    torch.testing.assert_close(difference, difference.mean().expand_as(difference), atol=1e-10, rtol=0)
