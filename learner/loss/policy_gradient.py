"""What the log-ratio D = log target - log student becomes before it is an advantage: maps of one number per token.

All of them are 0 where target and student agree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_LOG_RATIO = 20.0  # above it, in nats, a ratio of probabilities is that of a broken score; exp(20) = 4.9e8


@dataclass(frozen=True)
class MapShape:
    """The numbers that shape a map; each map reads its own."""

    bound: float = 5.0  # clip, tanh
    scale: float = 1.0  # tanh
    alpha: float = 1.0  # power, proximal


LogRatioFunction = Callable[[Tensor, Tensor, MapShape], Tensor]


def identity(log_target: Tensor, log_student: Tensor, _shape: MapShape) -> Tensor:
    """Return D: its expected policy gradient is that of the reverse KL."""
    return log_target - log_student


def clip(log_target: Tensor, log_student: Tensor, shape: MapShape) -> Tensor:
    """Return D, at most `bound` away from 0."""
    return (log_target - log_student).clamp(-shape.bound, shape.bound)


def soft_log(log_target: Tensor, log_student: Tensor, _shape: MapShape) -> Tensor:
    """Return sign(D) log(1 + |D|) (arXiv 2607.13399)."""
    log_ratio = log_target - log_student
    return log_ratio.sign() * log_ratio.abs().log1p()


def tanh(log_target: Tensor, log_student: Tensor, shape: MapShape) -> Tensor:
    """Return bound tanh(D / scale)."""
    return shape.bound * ((log_target - log_student) / shape.scale).tanh()


def power(log_target: Tensor, log_student: Tensor, shape: MapShape) -> Tensor:
    """Return target^alpha - student^alpha (PowerOPD, arXiv 2606.17199), in [-1, 1] where the target is normalised."""
    return _exp(shape.alpha * log_target) - _exp(shape.alpha * log_student)


def proximal(log_target: Tensor, log_student: Tensor, shape: MapShape) -> Tensor:
    """Return log(alpha target/student + 1 - alpha) (TOP-D, arXiv 2607.04751), at least log(1 - alpha)."""
    log_ratio = log_target - log_student
    if shape.alpha >= 1:
        return log_ratio
    return torch.logaddexp(log_ratio + math.log(shape.alpha), torch.full_like(log_ratio, math.log1p(-shape.alpha)))


def forward_kl(log_target: Tensor, log_student: Tensor, _shape: MapShape) -> Tensor:
    """Return target/student - 1: its expected policy gradient is that of the forward KL (OPD+, arXiv 2606.01039).

    OPD+ has the ratio alone. The 1 is a baseline, so the expectation is the same; with it the gradient of every single
    sample is 0 where target and student agree, and a sum over part of the vocabulary keeps that optimum.
    """
    return (log_target - log_student).clamp(max=LARGEST_LOG_RATIO).expm1()


def jsd(log_target: Tensor, log_student: Tensor, _shape: MapShape) -> Tensor:
    """Return log((1 + target/student) / 2) / 2: its policy gradient is that of the Jensen-Shannon divergence (OPD+)."""
    return (functional.softplus(log_target - log_student) - math.log(2)) / 2


LOG_RATIO_MAPS: dict[str, LogRatioFunction] = {
    "identity": identity,
    "clip": clip,
    "soft_log": soft_log,
    "tanh": tanh,
    "power": power,
    "proximal": proximal,
    "forward_kl": forward_kl,
    "jsd": jsd,
}


def _exp(log_value: Tensor) -> Tensor:
    return log_value.clamp(max=LARGEST_LOG_RATIO).exp()


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
