"""Divergences between student and target on some tokens of the vocabulary, truncated so that equality stays optimal.

Inputs are log-probabilities, finite, [tokens, k]. `to_buckets` makes of the candidates what a truncation compares, and
the divergences sum over these buckets. Every term is written in the generalized form a log(a/b) - a + b: the added
terms cancel over buckets that sum to 1, and they make each bucket's value at least 0 and its gradient exactly 0 where
student and target agree, whatever the buckets sum to. The raw sum of a log(a/b) over part of the vocabulary has neither
property (Zhu et al. 2026, arXiv 2605.11182, eq. 8) and is not offered.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LOWEST_LOGPROB = -87.0  # its exponential is the smallest normal float32; stands for -inf and whatever lies below
SMALLEST_TAIL = 1e-6  # float32 log-probabilities of the candidates leave the mass outside known to about this much
EXCLUDED = -1e4  # log-probability of a candidate that does not take part: its exponential is 0 and its value is finite

BucketDivergence = Callable[[Tensor, Tensor, float], Tensor]


def forward_kl(student: Tensor, target: Tensor, _parameter: float = 0.0) -> Tensor:
    """Return KL(target || student), [tokens]."""
    return _generalized_kl(target, student)


def reverse_kl(student: Tensor, target: Tensor, _parameter: float = 0.0) -> Tensor:
    """Return KL(student || target), [tokens]."""
    return _generalized_kl(student, target)


def jsd(student: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return the Jensen-Shannon divergence of weight beta as GKD (Agarwal et al. 2023) and TRL define it, [tokens].

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. That is 0 at both ends, so beta = 0 stands
    for the forward KL(q || p) and beta = 1 for the reverse KL(p || q), the limits of its gradient's direction.
    """
    if beta in (0, 1):
        return reverse_kl(student, target) if beta else forward_kl(student, target)
    mixture = mix(target, student, beta)
    return beta * _generalized_kl(target, mixture) + (1 - beta) * _generalized_kl(student, mixture)


def skewed_forward_kl(student: Tensor, target: Tensor, skew: float) -> Tensor:
    """Return KL(target || skew target + (1 - skew) student) (DistiLLM, Ko et al. 2024), [tokens]."""
    return _generalized_kl(target, mix(target, student, skew))


def skewed_reverse_kl(student: Tensor, target: Tensor, skew: float) -> Tensor:
    """Return KL(student || skew student + (1 - skew) target) (DistiLLM, Ko et al. 2024), [tokens]."""
    return _generalized_kl(student, mix(student, target, skew))


BUCKET_DIVERGENCES: dict[str, BucketDivergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
}


def to_buckets(logprobs: Tensor, inside: Tensor | None, truncation: str) -> Tensor:
    """Return the log-probabilities that a truncation compares.

    Args:
        logprobs: of the candidates, [tokens, k].
        inside: [tokens, k], which candidates take part; None: all. The others become EXCLUDED.
        truncation: "generalized" keeps the candidates as they are; "renormalized" divides them by their sum; "tail"
            appends a bucket with the mass of all other tokens, [tokens, k + 1].
    """
    kept = logprobs if inside is None else logprobs.masked_fill(~inside, EXCLUDED)
    if truncation == "renormalized":
        return kept.log_softmax(-1)
    return with_tail(kept) if truncation == "tail" else kept


def with_tail(logprobs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: [tokens, k] -> [tokens, k + 1].

    A tail below SMALLEST_TAIL, or below 0 by rounding, becomes SMALLEST_TAIL and carries no gradient.
    """
    if not logprobs.shape[-1]:
        return logprobs.new_zeros(len(logprobs), 1)
    mass_log = logprobs.logsumexp(dim=-1, keepdim=True).clamp(max=math.log1p(-SMALLEST_TAIL))
    return torch.cat([logprobs, _log1mexp(mass_log)], dim=-1)


def mix(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log(share a + (1 - share) b)."""
    if share in (0, 1):
        return log_a if share else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _generalized_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a = log_a.exp()
    return (a * (log_a - log_b) - a + log_b.exp()).sum(-1)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, by the branch that keeps precision (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # Each branch gets an argument at which its gradient is finite: `where` multiplies the unused one by 0.
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, small, large)
