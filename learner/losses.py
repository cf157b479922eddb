"""The objective: pure functions of log-probabilities, summed over completion tokens and divided by a given denominator.

`num_tokens` counts the completion tokens of the whole optimizer step, over all micro-batches and ranks, so the parts
add up to the same loss however the step is cut.

The divergences compare the student (p) with the teacher (q) on the teacher's k most likely tokens and one more bucket
that holds the rest of the vocabulary. Every term is written in the generalized form a log(a/b) - a + b: the added
terms cancel over buckets that sum to 1, and they make each bucket's value at least 0 and its gradient exactly 0 where
student and teacher agree, even where rounding leaves the buckets with a sum other than 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_TAIL = 1e-6  # fp32 log-probabilities of the top-k leave the tail's mass known to about this much
LOWEST_LOGPROB = -87.0  # its exponential is the smallest normal fp32 number; replaces the -inf of masked logits

TopkDivergence = Callable[[Tensor, Tensor, int, float], Tensor]


def sampled_reverse_kl(
    student_logprobs: Tensor,  # [tokens] learner, now
    rollout_logprobs: Tensor,  # [tokens] rollout worker, when sampled
    teacher_logprobs: Tensor,  # [tokens]
    num_tokens: int,
) -> Tensor:
    """Policy-gradient estimate of KL(student || teacher), corrected for the age and temperature of the samples.

    The log-ratio is that of the current student and carries no gradient; the gradient runs through the importance
    ratio: E_rollout[student/rollout * log(student/teacher) * grad log student].
    """
    student_logprobs = student_logprobs.float().clamp(min=LOWEST_LOGPROB)
    reverse_kl = (student_logprobs - teacher_logprobs).detach()
    importance = (student_logprobs - rollout_logprobs).exp()
    return (importance * reverse_kl).sum() / max(1, num_tokens)


def reverse_kl(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, num_tokens: int, _beta: float) -> Tensor:
    """Return KL(student || teacher) over the teacher's top-k and the tail bucket; inputs are [tokens, k]."""
    student, teacher = with_tail_bucket(student_topk_logprobs), with_tail_bucket(teacher_topk_logprobs)
    return _generalized_kl(student, teacher).sum() / max(1, num_tokens)


def forward_kl(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, num_tokens: int, _beta: float) -> Tensor:
    """Return KL(teacher || student) over the teacher's top-k and the tail bucket; inputs are [tokens, k]."""
    student, teacher = with_tail_bucket(student_topk_logprobs), with_tail_bucket(teacher_topk_logprobs)
    return _generalized_kl(teacher, student).sum() / max(1, num_tokens)


def jsd(student_topk_logprobs: Tensor, teacher_topk_logprobs: Tensor, num_tokens: int, beta: float) -> Tensor:
    """Return the Jensen-Shannon divergence of weight beta in the convention of GKD (Agarwal et al. 2023) and TRL.

    beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. That is 0 at both ends, so beta = 0 stands
    for the forward KL(q || p) and beta = 1 for the reverse KL(p || q), the limits of its gradient's direction.
    """
    if beta == 0:
        return forward_kl(student_topk_logprobs, teacher_topk_logprobs, num_tokens, beta)
    if beta == 1:
        return reverse_kl(student_topk_logprobs, teacher_topk_logprobs, num_tokens, beta)
    student, teacher = with_tail_bucket(student_topk_logprobs), with_tail_bucket(teacher_topk_logprobs)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    terms = beta * _generalized_kl(teacher, mixture) + (1 - beta) * _generalized_kl(student, mixture)
    return terms.sum() / max(1, num_tokens)


TOPK_DIVERGENCES: dict[str, TopkDivergence] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd}


def with_tail_bucket(logprobs: Tensor) -> Tensor:
    """Append the log-probability of all other tokens: [tokens, k] -> [tokens, k + 1].

    A tail below SMALLEST_TAIL, or below 0 by rounding, becomes SMALLEST_TAIL and carries no gradient.
    """
    logprobs = logprobs.float().clamp(min=LOWEST_LOGPROB)
    mass_log = logprobs.logsumexp(dim=-1, keepdim=True).clamp(max=math.log1p(-SMALLEST_TAIL))
    return torch.cat([logprobs, _log1mexp(mass_log)], dim=-1)


def _generalized_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    a, b = log_a.exp(), log_b.exp()
    return a * (log_a - log_b) - a + b


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, by the branch that keeps precision (Maechler 2012)."""
    near_zero = x > -math.log(2)
    # Each branch gets an argument at which its gradient is finite: `where` multiplies the unused one by 0.
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, small, large)
