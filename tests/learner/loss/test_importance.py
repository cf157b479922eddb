"""Surrogates: value and gradient at ratios of 1/2, 1 and 4, derived by hand."""

import math

import pytest
import torch
from torch import Tensor

from cluster.config.terms import ImportanceConfig
from learner.loss.policy_gradient import SURROGATES, importance_ratio

RATIOS = [0.5, 1.0, 4.0]
BOUNDS = ImportanceConfig(low=0.8, high=2.0)


def surrogate(kind: str, advantage: float, bounds: ImportanceConfig = BOUNDS) -> tuple[list[float], list[float]]:
    """Return losses, and gradients by the student's log-probabilities, at the three ratios."""
    rollout = torch.full((3,), -3.0, dtype=torch.float64)
    student = (rollout + torch.tensor(RATIOS, dtype=torch.float64).log()).requires_grad_()
    losses = SURROGATES[kind](torch.full((3,), advantage, dtype=torch.float64), student, rollout, bounds)
    (gradient,) = torch.autograd.grad(losses.sum(), student)
    return losses.tolist(), gradient.tolist()


@pytest.mark.parametrize(
    ("kind", "advantage", "losses", "gradient"),
    [
        ("none", 3.0, [-3, -3, -3], [-3, -3, -3]),
        ("ratio", 3.0, [-1.5, -3, -12], [-1.5, -3, -12]),
        ("sequence_mask", 3.0, [-1.5, -3, -12], [-1.5, -3, -12]),
        ("truncated", 3.0, [-1.5, -3, -6], [-1.5, -3, -6]),
        ("icepop", 3.0, [0, -3, 0], [0, -3, 0]),
        ("ppo_clip", 3.0, [-1.5, -3, -6], [-1.5, -3, 0]),
        ("ppo_clip", -3.0, [2.4, 3, 12], [0, 3, 12]),
    ],
)
def test_losses_and_gradients_are_those_derived_by_hand(
    kind: str, advantage: float, losses: list[float], gradient: list[float]
) -> None:
    found = surrogate(kind, advantage)
    assert found == (pytest.approx(losses), pytest.approx(gradient))


def test_a_dual_clip_bounds_the_loss_of_bad_tokens_and_leaves_good_ones_alone() -> None:
    dual = ImportanceConfig(low=0.8, high=2.0, dual_clip=3.0)
    assert surrogate("ppo_clip", -3.0, dual) == (pytest.approx([2.4, 3, 9]), pytest.approx([0, 3, 0]))
    assert surrogate("ppo_clip", 3.0, dual) == surrogate("ppo_clip", 3.0)


@pytest.mark.parametrize("kind", SURROGATES)
def test_ratios_beyond_float32_give_finite_losses_and_gradients(kind: str) -> None:
    student = torch.tensor([0.0, -87.0], requires_grad=True)
    losses: Tensor = SURROGATES[kind](torch.tensor([-87.0, 87.0]), student, torch.tensor([-1e4, 1e4]), BOUNDS)
    assert losses.isfinite().all()
    assert torch.autograd.grad(losses.sum(), student)[0].isfinite().all()
    assert importance_ratio(torch.tensor(0.0), torch.tensor(-1e4)).item() == pytest.approx(math.exp(20))
