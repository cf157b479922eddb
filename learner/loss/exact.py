"""Divergences over the whole vocabulary with their gradient by the student's logits, without autograd.

With h the derivative of the loss by the log-probabilities, the derivative by the logits is h - p sum(h); each function
writes out what is left of it. `target` holds log-probabilities [n, vocabulary]. It and the spare buffers of that shape
are overwritten, and the gradient is returned in one of them. Log-probabilities are at least LOWEST_LOGPROB, so that no
probability is 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot


@dataclass(frozen=True)
class Distribution:
    """A distribution over the vocabulary, both ways."""

    logprobs: Tensor  # [n, vocabulary]
    probabilities: Tensor  # [n, vocabulary]

    def renormalise(self, width: int) -> tuple["Distribution", Tensor]:
        """Make the first tokens a distribution of their own, in place; return it and what they summed to, [n, 1]."""
        logprobs, probabilities = self.logprobs[:, :width], self.probabilities[:, :width]
        mass = probabilities.sum(-1, keepdim=True)
        return Distribution(logprobs.sub_(mass.log()), probabilities.div_(mass)), mass


class Spare(NamedTuple):
    """Buffers that a divergence may use."""

    first: Tensor  # [n, vocabulary]
    second: Tensor  # [n, vocabulary]


ExactDivergence = Callable[[Distribution, Tensor, Spare, float], tuple[Tensor, Tensor]]


def reverse_kl(student: Distribution, target: Tensor, _spare: Spare, _parameter: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return KL(student || target), [n], and p (log p - log q - loss), [n, vocabulary]."""
    log_ratio = torch.sub(student.logprobs, target, out=target)
    losses = vecdot(student.probabilities, log_ratio)
    return losses, log_ratio.sub_(losses[:, None]).mul_(student.probabilities)


def forward_kl(student: Distribution, target: Tensor, spare: Spare, _parameter: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return KL(target || student), [n], and p - q, [n, vocabulary]."""
    q = torch.exp(target, out=spare.first)
    losses = vecdot(q, target.sub_(student.logprobs))
    return losses, torch.sub(student.probabilities, q, out=q)


def jsd(student: Distribution, target: Tensor, spare: Spare, beta: float) -> tuple[Tensor, Tensor]:
    """Return `divergences.jsd`, [n], and (1 - beta) p (log p - log m - KL(p || m)), [n, vocabulary]."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student, target, spare)
    q = torch.exp(target, out=spare.first)
    log_mixture = _mix(q, student.probabilities, beta, out=spare.second).log_()
    of_target = vecdot(q, target.sub_(log_mixture))
    log_ratio = torch.sub(student.logprobs, log_mixture, out=log_mixture)
    of_student = vecdot(student.probabilities, log_ratio)
    gradient = log_ratio.sub_(of_student[:, None]).mul_(student.probabilities).mul_(1 - beta)
    return beta * of_target + (1 - beta) * of_student, gradient


def skewed_forward_kl(student: Distribution, target: Tensor, spare: Spare, skew: float) -> tuple[Tensor, Tensor]:
    """Return KL(q || m), m = skew q + (1 - skew) p, [n], and (1 - skew) p (sum(p q / m) - q / m), [n, vocabulary]."""
    if skew == 0:
        return forward_kl(student, target, spare)
    q = torch.exp(target, out=spare.first)
    mixture = _mix(q, student.probabilities, skew, out=spare.second)
    ratio = torch.div(q, mixture, out=mixture)
    losses = vecdot(q, torch.log(ratio, out=target))
    mean = vecdot(student.probabilities, ratio)
    return losses, torch.sub(mean[:, None], ratio, out=ratio).mul_(student.probabilities).mul_(1 - skew)


def skewed_reverse_kl(student: Distribution, target: Tensor, spare: Spare, skew: float) -> tuple[Tensor, Tensor]:
    """Return KL(p || m), m = skew p + (1 - skew) q, [n], and p (g - sum(p g)), g = log(p / m) - skew p / m."""
    if skew == 0:
        return reverse_kl(student, target, spare)
    q = torch.exp(target, out=target)
    mixture = _mix(student.probabilities, q, skew, out=spare.first)
    ratio = torch.div(student.probabilities, mixture, out=mixture)
    slope = torch.log(ratio, out=target)
    losses = vecdot(student.probabilities, slope)
    slope.sub_(ratio, alpha=skew)
    mean = vecdot(student.probabilities, slope)
    return losses, slope.sub_(mean[:, None]).mul_(student.probabilities)


EXACT_DIVERGENCES: dict[str, ExactDivergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}


def _mix(a: Tensor, b: Tensor, share: float, out: Tensor) -> Tensor:
    return torch.mul(a, share, out=out).add_(b, alpha=1 - share)
