"""Compares student p and target q by f-divergences: the sum over tokens of p phi(log q - log p), with phi(0) = 0.

The function phi says all there is to say of a divergence. Its derivative gives the gradient by the logits, and less its
tangent at 0 it is fit for part of a vocabulary: p (phi(d) - phi'(0) (e^d - 1)). What this takes off cancels over
buckets that sum to 1, and it makes each bucket's value at least 0 and its gradient exactly 0 where student and target
agree, whatever the buckets sum to. Of the Kullback-Leibler divergences that is a log(a/b) - a + b. The raw sum over
part of the vocabulary has neither property (Zhu et al. 2026, arXiv 2605.11182, eq. 8) and is not offered.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.linalg import vecdot

from cluster.contracts.errors import ConfigError
from cluster.contracts.import_path import is_import_path, load_object

LOWEST_LOGPROB = -80.0  # for -inf and what lies below; with d up to 80, d e^d is finite in float32 and p is normal
SMALLEST_TAIL = 1e-6  # float32 log-probabilities of the candidates leave the mass outside known to about this much
EXCLUDED = -1e4  # log-probability of a candidate that does not take part: its exponential is 0 and its value is finite


@dataclass(frozen=True)
class Divergence:
    """Defines an f-divergence by one function.

    Args:
        phi: takes d = log q - log p, of any shape, and the divergence's parameter; returns phi(d), by torch operations
            that autograd follows. It is convex in e^d, and finite for |d| <= -LOWEST_LOGPROB.
        value_and_slope: says the same of whole distributions in half of autograd's time: phi(d), and the slope
            phi(d) - phi'(d), which may be off by a constant. It may overwrite d, and its third argument, two spare
            tensors like d: on a CPU, fresh memory costs as much as the arithmetic. None: autograd.
        parameter: the field of a run file's term that holds the parameter.
        kernel: its name among the Triton kernels; None: plain torch computes it everywhere.
        ends: which divergence of the table it is at which parameter, where phi would be 0 or a slower way to say so.
        largest_entry: what a single token contributes at most; one that is cut has no gradient of its own.

    Example:
        >>> Divergence(lambda d, _: -d).losses(torch.zeros(1, 1), torch.ones(1, 1), 0.0)  # -1 + e - 1
        tensor([0.7183])
    """

    phi: Callable[[Tensor, float], Tensor]
    value_and_slope: Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]] | None = None
    parameter: str = "parameter"
    kernel: str | None = None
    ends: Mapping[float, str] = field(default_factory=dict)
    largest_entry: float | None = None

    def clipped(self, largest_entry: float | None) -> "Divergence":
        """Return the divergence with another bound of each token's contribution; no kernel knows of one."""
        return self if largest_entry is None else replace(self, kernel=None, largest_entry=largest_entry)

    def at(self, parameter: float) -> "Divergence":
        """Return the divergence that this one is at the parameter."""
        return DIVERGENCES[self.ends[parameter]].clipped(self.largest_entry) if parameter in self.ends else self

    def losses(self, student: Tensor, target: Tensor, parameter: float) -> Tensor:
        """Return the form that is fit for part of a vocabulary, [tokens], from log-probabilities [tokens, k]."""
        value, p = self.at(parameter).phi(target - student, parameter), student.exp()
        tangent = self.tangent(parameter)
        entries = p * value + tangent * p - tangent * target.exp()
        return (entries if self.largest_entry is None else entries.clamp(max=self.largest_entry)).sum(-1)

    def exact(
        self, logprobs: Tensor, probabilities: Tensor, target: Tensor, parameter: float, spare: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence of whole distributions, [n], and its gradient by the logits.

        The gradient p (slope - sum of p slope), [n, vocabulary], takes the memory of the target's log-probabilities.
        The spare memory, [2, n, vocabulary], is overwritten.
        """
        log_ratio = target.sub_(logprobs)
        if self.largest_entry is not None:
            return self._clipped_exact(log_ratio, probabilities, parameter, self.largest_entry)
        value, slope = (self.at(parameter).value_and_slope or self.by_autograd)(log_ratio, parameter, spare)
        losses = vecdot(probabilities, value)
        mean = losses if slope is value else vecdot(probabilities, slope)
        return losses, torch.sub(slope, mean[:, None], out=target).mul_(probabilities)

    def _clipped_exact(self, log_ratio: Tensor, p: Tensor, parameter: float, largest: float) -> tuple[Tensor, Tensor]:
        """Return the sum of min(p phi, largest), [n], and its gradient by the logits, [n, vocabulary].

        What is cut off has no slope, so a constant in the others' slopes no longer cancels: each is phi - phi', which
        is that of `by_autograd` less phi'(0). The latter's part is 0 to the bit where nothing is cut off.
        """
        value, slope = self.by_autograd(log_ratio, parameter)
        entries = p * value
        is_cut = entries > largest
        slope = slope.masked_fill(is_cut, 0.0) + self.tangent(parameter) * is_cut
        losses, gradient = entries.clamp(max=largest).sum(-1), p * (slope - vecdot(p, slope)[:, None])
        return losses, gradient

    def by_autograd(self, log_ratio: Tensor, parameter: float, _spare: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return phi and its slope, less what this is at 0: there equality moves nothing, to the bit."""
        value, derivative = self._with_derivative(log_ratio, parameter)
        return value, value - derivative + self.tangent(parameter)

    def tangent(self, parameter: float) -> float:
        """Return phi'(0)."""
        _, derivative = self._with_derivative(torch.zeros((), dtype=torch.float64), parameter)
        return float(derivative)

    def _with_derivative(self, log_ratio: Tensor, parameter: float) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            d = log_ratio.detach().requires_grad_()
            value = self.at(parameter).phi(d, parameter)
            (derivative,) = torch.autograd.grad(value.sum(), d)
        return value.detach(), derivative


def _log_mixture(d: Tensor, share: float) -> Tensor:
    """Return log(m / p) for m = share q + (1 - share) p."""
    return (share * d.exp() + (1 - share)).log()


def _reverse_kl(d: Tensor, _parameter: float, _spare: Tensor) -> tuple[Tensor, Tensor]:
    value = d.neg_()
    return value, value


def _forward_kl(d: Tensor, _parameter: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(d, out=spare[0])
    return d.mul_(ratio), ratio.neg_()


def _jsd_phi(d: Tensor, beta: float) -> Tensor:
    """Say the Jensen-Shannon divergence of weight beta as GKD (Agarwal et al. 2023) and TRL define it.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. That is 0 at both ends, so beta = 0 stands
    for the forward KL(q || p) and beta = 1 for the reverse KL(p || q), the limits of its gradient's direction.
    """
    log_mixture = _log_mixture(d, beta)
    return beta * d.exp() * (d - log_mixture) - (1 - beta) * log_mixture


def _jsd(d: Tensor, beta: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(d, out=spare[0])
    log_mixture = torch.add(d.new_full((), 1 - beta), ratio, alpha=beta, out=spare[1]).log_()
    d.sub_(log_mixture)
    slope = log_mixture.mul_(beta - 1)
    return torch.addcmul(slope, d, ratio, value=beta, out=d), slope


def _skewed_forward_kl(d: Tensor, skew: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.exp(d, out=spare[0])
    mixture = torch.mul(ratio, skew, out=spare[1]).add_(1 - skew)
    to_mixture = torch.div(ratio, mixture, out=mixture)  # q / m
    return torch.log(to_mixture, out=d).mul_(ratio), to_mixture.mul_(skew - 1)


def _skewed_reverse_kl(d: Tensor, skew: float, spare: Tensor) -> tuple[Tensor, Tensor]:
    mixture = d.exp_().mul_(1 - skew).add_(skew)  # m / p
    value = torch.log(mixture, out=spare[0]).neg_()
    return value, mixture.reciprocal_().mul_(-skew).add_(value)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(lambda d, _: d * d.exp(), _forward_kl, kernel="forward_kl"),  # KL(q || p)
    "reverse_kl": Divergence(lambda d, _: -d, _reverse_kl, kernel="reverse_kl"),  # KL(p || q)
    "jsd": Divergence(_jsd_phi, _jsd, "beta", kernel="jsd", ends={0.0: "forward_kl", 1.0: "reverse_kl"}),
    # KL(q || skew q + (1 - skew) p) and KL(p || skew p + (1 - skew) q) (DistiLLM, Ko et al. 2024).
    "skewed_forward_kl": Divergence(
        lambda d, skew: d.exp() * (d - _log_mixture(d, skew)),
        _skewed_forward_kl,
        "skew",
        kernel="skewed_forward_kl",
        ends={0.0: "forward_kl"},
    ),
    "skewed_reverse_kl": Divergence(
        lambda d, skew: -_log_mixture(d, 1 - skew),
        _skewed_reverse_kl,
        "skew",
        kernel="skewed_reverse_kl",
        ends={0.0: "reverse_kl"},
    ),
}


def find_divergence(name: str) -> Divergence:
    """Return a divergence of the table, or the object at an import path; raise ConfigError if it is no Divergence."""
    if not is_import_path(name):
        return DIVERGENCES[name]
    divergence = load_object(name, "a divergence")
    if not isinstance(divergence, Divergence):
        raise ConfigError(
            f"'{name}' as a divergence is a {type(divergence).__name__}; expected a learner.loss.divergences.Divergence"
        )
    return divergence


def to_buckets(logprobs: Tensor, inside: Tensor | None, truncation: str) -> Tensor:
    """Return the log-probabilities that a truncation compares.

    Args:
        logprobs: of the candidates, finite, [tokens, k].
        inside: [tokens, k], which candidates take part; None: all. The others become EXCLUDED.
        truncation: "generalized" keeps the candidates as they are; "renormalized" divides them by their sum; "tail"
            appends a bucket with the mass of all other tokens, [tokens, k + 1].
    """
    kept = logprobs if inside is None else logprobs.masked_fill(~inside, EXCLUDED)
    if truncation == "renormalized":
        return kept.log_softmax(-1)
    return with_tail(kept) if truncation == "tail" else kept


def is_tail_floored(logprobs: Tensor, inside: Tensor | None) -> Tensor:
    """Return whether what log-probabilities [tokens, k] leave to others counts as SMALLEST_TAIL, [tokens]."""
    return to_buckets(logprobs, inside, "generalized").logsumexp(dim=-1) >= math.log1p(-SMALLEST_TAIL)


def with_tail(logprobs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: [tokens, k] -> [tokens, k + 1].

    A tail below SMALLEST_TAIL, or below 0 by rounding, becomes SMALLEST_TAIL and carries no gradient.
    """
    if not logprobs.shape[-1]:
        return logprobs.new_zeros(len(logprobs), 1)
    mass_log = logprobs.logsumexp(dim=-1, keepdim=True).clamp(max=math.log1p(-SMALLEST_TAIL))
    return torch.cat([logprobs, _log1mexp(mass_log)], dim=-1)


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, by the branch that keeps precision (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # Each branch gets an argument at which its gradient is finite: `where` multiplies the unused one by 0.
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, small, large)
