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
