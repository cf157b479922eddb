"""Bucket divergences: values derived by hand, gradients, and what a truncation keeps."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from learner.loss.divergences import SMALLEST_TAIL, to_buckets, with_tail
from tests.learner.loss.builders import (
    BUCKET_DIVERGENCES,
    forward_kl,
    jsd,
    random_logprobs,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
)

NAMES = sorted(BUCKET_DIVERGENCES)
TRUNCATIONS = ["generalized", "renormalized", "tail"]
PARAMETER = 0.4


def log(*probabilities: float) -> Tensor:
    """Return log-probabilities of one token position, [1, k]."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


P, Q = log(0.25, 0.75), log(0.5, 0.5)


@pytest.mark.parametrize(
    ("divergence", "parameter", "expected"),
    [
        (reverse_kl, 0.0, 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)),
        (forward_kl, 0.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        # m = (3/8, 5/8)
        (jsd, 0.5, 0.25 * math.log(4 / 3 * 4 / 5) + 0.125 * math.log(2 / 3) + 0.375 * math.log(6 / 5)),
        # m = 0.2 q + 0.8 p = (0.3, 0.7)
        (jsd, 0.2, 0.1 * math.log(5 / 3 * 5 / 7) + 0.2 * math.log(5 / 6) + 0.6 * math.log(15 / 14)),
        (skewed_forward_kl, 0.2, 0.5 * math.log(5 / 3) + 0.5 * math.log(5 / 7)),
        # m = 0.2 p + 0.8 q = (0.45, 0.55)
        (skewed_reverse_kl, 0.2, 0.25 * math.log(5 / 9) + 0.75 * math.log(15 / 11)),
    ],
)
def test_divergences_have_the_values_derived_by_hand(
    divergence: Callable[[Tensor, Tensor, float], Tensor], parameter: float, expected: float
) -> None:
    assert divergence(P, Q, parameter).item() == pytest.approx(expected, abs=1e-12)


def test_forward_and_reverse_are_not_each_other() -> None:
    assert forward_kl(P, Q).item() == pytest.approx(reverse_kl(Q, P).item())
    assert forward_kl(P, Q).item() != pytest.approx(reverse_kl(P, Q).item(), abs=1e-2)


def test_divergences_over_the_whole_vocabulary_are_those_of_torch() -> None:
    p, q = random_logprobs(5, 9, seed=0), random_logprobs(5, 9, seed=1)
    torch.testing.assert_close(reverse_kl(p, q), functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    torch.testing.assert_close(forward_kl(p, q), functional.kl_div(p, q, log_target=True, reduction="none").sum(-1))


def test_jsd_at_its_ends_is_forward_and_reverse_kl() -> None:
    p, q = random_logprobs(3, 6, seed=2), random_logprobs(3, 6, seed=3)
    assert torch.equal(jsd(p, q, 0.0), forward_kl(p, q))
    assert torch.equal(jsd(p, q, 1.0), reverse_kl(p, q))


def test_jsd_near_its_ends_points_where_the_two_kls_do() -> None:
    logits, q = random_logprobs(3, 6, seed=4), random_logprobs(3, 6, seed=5)

    def direction(divergence: Callable[[Tensor, Tensor, float], Tensor], beta: float) -> Tensor:
        z = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(z.log_softmax(-1), q, beta).sum(), z)
        return functional.normalize(gradient.flatten(), dim=0)

    assert direction(jsd, 1e-3) @ direction(forward_kl, 0.0) > 0.999
    assert direction(jsd, 1 - 1e-3) @ direction(reverse_kl, 0.0) > 0.999


@pytest.mark.parametrize(("skewed", "plain"), [(skewed_forward_kl, forward_kl), (skewed_reverse_kl, reverse_kl)])
def test_a_skew_of_0_is_the_plain_divergence_and_of_1_nothing(
    skewed: Callable[[Tensor, Tensor, float], Tensor], plain: Callable[[Tensor, Tensor], Tensor]
) -> None:
    assert torch.equal(skewed(P, Q, 0.0), plain(P, Q))
    assert skewed(P, Q, 1.0).item() == pytest.approx(0, abs=1e-15)


def test_the_tail_holds_what_is_missing_to_one() -> None:
    assert with_tail(log(0.5, 0.25)).exp().tolist() == [pytest.approx([0.5, 0.25, 0.25])]
    assert with_tail(torch.empty(2, 0)).exp().tolist() == [[1.0], [1.0]]


def test_a_tail_below_what_float32_knows_is_that_and_moves_nothing() -> None:
    logprobs = log(0.7, 0.3000003).float().requires_grad_()
    tail = with_tail(logprobs)[:, -1]
    assert tail.exp().item() == pytest.approx(SMALLEST_TAIL, rel=0.05)
    assert torch.autograd.grad(tail.sum(), logprobs)[0].abs().max() == 0


def test_truncations_compare_what_they_say() -> None:
    logprobs = log(0.5, 0.2, 0.1)
    inside = torch.tensor([[True, False, True]])
    assert to_buckets(logprobs, None, "generalized").exp().tolist() == [pytest.approx([0.5, 0.2, 0.1])]
    assert to_buckets(logprobs, None, "renormalized").exp().tolist() == [pytest.approx([5 / 8, 2 / 8, 1 / 8])]
    assert to_buckets(logprobs, inside, "generalized").exp().tolist() == [pytest.approx([0.5, 0, 0.1])]
    assert to_buckets(logprobs, inside, "renormalized").exp().tolist() == [pytest.approx([5 / 6, 0, 1 / 6])]
    assert to_buckets(logprobs, inside, "tail").exp().tolist() == [pytest.approx([0.5, 0, 0.1, 0.4])]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_value_and_gradient_are_zero_where_student_and_target_agree(name: str, truncation: str, scale: float) -> None:
    target = random_logprobs(16, 50, seed=6, scale=scale, dtype=torch.float32).clamp(min=-80)
    top = target.topk(8).values
    logprobs = top.clone().requires_grad_()
    losses = BUCKET_DIVERGENCES[name](
        to_buckets(logprobs, None, truncation), to_buckets(top, None, truncation), PARAMETER
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_values_are_positive_where_student_and_target_differ(name: str, truncation: str) -> None:
    p, q = random_logprobs(20, 30, seed=7), random_logprobs(20, 30, seed=8)
    ids = q.topk(5).indices
    buckets = [to_buckets(side.gather(-1, ids), None, truncation) for side in (p, q)]
    assert (BUCKET_DIVERGENCES[name](buckets[0], buckets[1], PARAMETER) > 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("truncation", ["renormalized", "tail"])
def test_the_gradient_is_that_of_the_divergence_between_bucketed_distributions(name: str, truncation: str) -> None:
    """The generalized form adds nothing where the buckets sum to 1."""
    q = random_logprobs(6, 30, seed=9)
    ids = q.topk(5).indices
    logits = random_logprobs(6, 30, seed=10).requires_grad_()

    def buckets(logprobs: Tensor) -> Tensor:
        kept = logprobs.gather(-1, ids).exp()
        if truncation == "tail":
            return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
        return kept / kept.sum(-1, keepdim=True)

    a, b = buckets(logits.log_softmax(-1)), buckets(q)
    m, skewed = PARAMETER * b + (1 - PARAMETER) * a, PARAMETER * a + (1 - PARAMETER) * b
    plain = {
        "reverse_kl": a * (a / b).log(),
        "forward_kl": b * (b / a).log(),
        "jsd": PARAMETER * b * (b / m).log() + (1 - PARAMETER) * a * (a / m).log(),
        "skewed_forward_kl": b * (b / m).log(),
        "skewed_reverse_kl": a * (a / skewed).log(),
    }[name].sum(-1)
    student = to_buckets(logits.log_softmax(-1).gather(-1, ids), None, truncation)
    ours = BUCKET_DIVERGENCES[name](student, to_buckets(q.gather(-1, ids), None, truncation), PARAMETER)
    torch.testing.assert_close(ours, plain)
    first, second = (torch.autograd.grad(losses.sum(), logits, retain_graph=True)[0] for losses in (ours, plain))
    torch.testing.assert_close(first, second, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_a_position_without_any_candidate_inside_counts_nothing(name: str, truncation: str) -> None:
    inside = torch.tensor([[False, False]])
    logprobs = log(0.6, 0.1).requires_grad_()
    losses = BUCKET_DIVERGENCES[name](
        to_buckets(logprobs, inside, truncation), to_buckets(log(0.2, 0.7), inside, truncation), PARAMETER
    )
    assert losses.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(losses.sum() + 0 * logprobs.sum(), logprobs)
    assert gradient.abs().max() == 0
