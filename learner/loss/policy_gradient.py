"""Makes advantages of the log-ratio D = log target - log student, and losses of advantages.

All maps of D but the constant are 0 where target and student agree.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from cluster.config.terms import ImportanceConfig, PolicyGradientTerm

LARGEST_LOG_RATIO = 20.0  # above it, in nats, a ratio of probabilities is that of a broken score; exp(20) = 4.9e8


def proximal(log_target: Tensor, log_student: Tensor, term: PolicyGradientTerm) -> Tensor:
    """Return log(alpha target/student + 1 - alpha) (TOP-D, arXiv 2607.04751), at least log(1 - alpha)."""
    log_ratio = log_target - log_student
    if term.alpha >= 1:
        return log_ratio
    return torch.logaddexp(log_ratio + math.log(term.alpha), torch.full_like(log_ratio, math.log1p(-term.alpha)))


# Each takes log target, log student and the term.
LOG_RATIO_MAPS: dict[str, Callable[[Tensor, Tensor, PolicyGradientTerm], Tensor]] = {
    "identity": lambda q, p, _: q - p,  # its expected policy gradient is that of the reverse KL
    "clip": lambda q, p, term: (q - p).clamp(-term.bound, term.bound),
    "soft_log": lambda q, p, _: (q - p).sign() * (q - p).abs().log1p(),  # arXiv 2607.13399
    "tanh": lambda q, p, term: term.bound * ((q - p) / term.scale).tanh(),
    # Target^alpha - student^alpha (PowerOPD, arXiv 2606.17199), in [-1, 1] where the target is normalised.
    "power": lambda q, p, term: _exp(term.alpha * q) - _exp(term.alpha * p),
    "proximal": proximal,
    # Target/student - 1: its expected policy gradient is that of the forward KL (OPD+, arXiv 2606.01039, which has the
    # ratio alone). The 1 is a baseline, so the expectation is the same; with it the gradient of every single sample is
    # 0 where target and student agree, and a sum over part of the vocabulary keeps that optimum.
    "forward_kl": lambda q, p, _: (q - p).clamp(max=LARGEST_LOG_RATIO).expm1(),
    # Log((1 + target/student) / 2) / 2: its policy gradient is that of the Jensen-Shannon divergence (OPD+).
    "jsd": lambda q, p, _: (functional.softplus(q - p) - math.log(2)) / 2,
    # No teacher: a control arm (OPSA, arXiv 2608.31046). Only with a condition is its expectation other than 0.
    "constant": lambda q, _, term: torch.full_like(q, -term.alpha),
}


def _exp(log_value: Tensor) -> Tensor:
    return log_value.clamp(max=LARGEST_LOG_RATIO).exp()


def importance_ratio(student: Tensor, rollout: Tensor) -> Tensor:
    """Return student / rollout probability, bounded so that neither it nor its gradient overflows."""
    return (student - rollout).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def temperature_shift(student: Tensor, temperature: float, normaliser: Tensor) -> Tensor:
    """Return log p_T - log p of the student's log-probabilities [n, k], without gradient; 0 at temperature 1."""
    student = student.detach()
    return student / temperature - normaliser[:, None] - student


def no_ratio(advantage: Tensor, student: Tensor, _rollout: Tensor, _bounds: ImportanceConfig) -> Tensor:
    """Return -advantage, with the gradient of -advantage log student."""
    return -advantage * _one_with_gradient(student)


def ratio(advantage: Tensor, student: Tensor, rollout: Tensor, _bounds: ImportanceConfig) -> Tensor:
    """Return -ratio advantage: unbiased for rollouts of any age."""
    return -advantage * importance_ratio(student, rollout)


def truncated(advantage: Tensor, student: Tensor, rollout: Tensor, bounds: ImportanceConfig) -> Tensor:
    """Return -min(ratio, high) advantage; a ratio above `high` weighs the gradient as `high` does."""
    weight = importance_ratio(student, rollout).detach().clamp(max=bounds.high)
    return -advantage * weight * _one_with_gradient(student)


def icepop(advantage: Tensor, student: Tensor, rollout: Tensor, bounds: ImportanceConfig) -> Tensor:
    """Return -ratio advantage where the ratio lies in [low, high], and 0 elsewhere (IcePop)."""
    weight = importance_ratio(student, rollout)
    is_within = ((weight >= bounds.low) & (weight <= bounds.high)).detach()
    return -advantage * weight * is_within


def ppo_clip(advantage: Tensor, student: Tensor, rollout: Tensor, bounds: ImportanceConfig) -> Tensor:
    """Return PPO's clipped surrogate; `dual_clip` bounds the loss of tokens with a negative advantage."""
    weight = importance_ratio(student, rollout)
    gain = torch.minimum(weight * advantage, weight.clamp(bounds.low, bounds.high) * advantage)
    if bounds.dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, bounds.dual_clip * advantage), gain)
    return -gain


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, ImportanceConfig], Tensor]] = {
    "none": no_ratio,
    "ratio": ratio,
    "truncated": truncated,
    "icepop": icepop,
    "sequence_mask": ratio,  # times `trusted_trajectory`, which is known before the chunks
    "ppo_clip": ppo_clip,
}


def _one_with_gradient(student: Tensor) -> Tensor:
    return (student - student.detach()).exp()
