"""Policy-gradient surrogates: what the ratio student / rollout probability does to the advantage of a drawn token.

Each returns the loss per token, whose gradient by the student's log-probability is -R(ratio) times the advantage. The
advantage carries no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objective.log_ratio import LARGEST_LOG_RATIO


@dataclass(frozen=True)
class RatioBounds:
    """The range of ratios that a surrogate trusts; each reads its own."""

    low: float = 0.5
    high: float = 2.0
    dual_clip: float | None = None


Surrogate = Callable[[Tensor, Tensor, Tensor, RatioBounds], Tensor]


def importance_ratio(student: Tensor, rollout: Tensor) -> Tensor:
    """Return student / rollout probability, bounded so that neither it nor its gradient overflows."""
    return (student - rollout).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def no_ratio(advantage: Tensor, student: Tensor, _rollout: Tensor, _bounds: RatioBounds) -> Tensor:
    """Return -advantage, with the gradient of -advantage log student."""
    return -advantage * _one_with_gradient(student)


def ratio(advantage: Tensor, student: Tensor, rollout: Tensor, _bounds: RatioBounds) -> Tensor:
    """Return -ratio advantage: unbiased for rollouts of any age."""
    return -advantage * importance_ratio(student, rollout)


def truncated(advantage: Tensor, student: Tensor, rollout: Tensor, bounds: RatioBounds) -> Tensor:
    """Return -min(ratio, high) advantage; a ratio above `high` weighs the gradient as `high` does."""
    weight = importance_ratio(student, rollout).detach().clamp(max=bounds.high)
    return -advantage * weight * _one_with_gradient(student)


def icepop(advantage: Tensor, student: Tensor, rollout: Tensor, bounds: RatioBounds) -> Tensor:
    """Return -ratio advantage where the ratio lies in [low, high], and 0 elsewhere (IcePop)."""
    found = importance_ratio(student, rollout)
    return -advantage * found * _within(found, bounds)


def ppo_clip(advantage: Tensor, student: Tensor, rollout: Tensor, bounds: RatioBounds) -> Tensor:
    """Return PPO's clipped surrogate; `dual_clip` bounds the loss of tokens with a negative advantage."""
    found = importance_ratio(student, rollout)
    gain = torch.minimum(found * advantage, found.clamp(bounds.low, bounds.high) * advantage)
    if bounds.dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, bounds.dual_clip * advantage), gain)
    return -gain


SURROGATES: dict[str, Surrogate] = {
    "none": no_ratio,
    "ratio": ratio,
    "truncated": truncated,
    "icepop": icepop,
    "sequence_mask": ratio,  # times `trusted_trajectories`, which is known before the chunks
    "ppo_clip": ppo_clip,
}


def _one_with_gradient(student: Tensor) -> Tensor:
    return (student - student.detach()).exp()


def _within(found: Tensor, bounds: RatioBounds) -> Tensor:
    return ((found >= bounds.low) & (found <= bounds.high)).detach()
