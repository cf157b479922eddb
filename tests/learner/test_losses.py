"""Values derived by hand, agreement with torch, gradients, and behaviour at the edges."""

import math

import pytest
import torch
from torch.nn import functional

from learner.losses import TOPK_DIVERGENCES, forward_kl, jsd, reverse_kl, sampled_reverse_kl, with_tail_bucket

TOPK_NAMES = sorted(TOPK_DIVERGENCES)


def random_logprobs(tokens, vocabulary, seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, vocabulary, generator=generator) * scale).log_softmax(-1)


def topk_of(student_logits, teacher_logprobs, k):
    values, ids = teacher_logprobs.topk(k, dim=-1)
    return student_logits.log_softmax(-1).gather(-1, ids), values


def test_the_tail_bucket_holds_what_is_missing_to_one():
    with_tail = with_tail_bucket(torch.tensor([[0.5, 0.25]]).log())
    assert with_tail.exp().tolist() == [pytest.approx([0.5, 0.25, 0.25])]


def test_divergences_have_the_values_derived_by_hand():
    student, teacher = torch.tensor([[0.25]]).log(), torch.tensor([[0.5]]).log()  # buckets: 1/4, 3/4 and 1/2, 1/2
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    forward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    # Mixture 3/8, 5/8.
    half = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) + 0.5 * (
        0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)
    )
    assert reverse_kl(student, teacher, 1, 0.0).item() == pytest.approx(reverse, abs=1e-6)
    assert forward_kl(student, teacher, 1, 0.0).item() == pytest.approx(forward, abs=1e-6)
    assert jsd(student, teacher, 1, 0.5).item() == pytest.approx(half, abs=1e-6)


def test_divergences_over_the_whole_vocabulary_equal_torch():
    p, q = random_logprobs(5, 9, 0), random_logprobs(5, 9, 1)
    # One token short of the vocabulary: the tail bucket is exactly the last token.
    expected_reverse = functional.kl_div(q, p, log_target=True, reduction="sum") / 5
    expected_forward = functional.kl_div(p, q, log_target=True, reduction="sum") / 5
    torch.testing.assert_close(reverse_kl(p[:, :-1], q[:, :-1], 5, 0.0), expected_reverse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(forward_kl(p[:, :-1], q[:, :-1], 5, 0.0), expected_forward, atol=1e-5, rtol=1e-5)


def test_jsd_weighs_the_mixture_as_gkd_does():
    p, q, beta = random_logprobs(4, 6, 2), random_logprobs(4, 6, 3), 0.3
    mixture = (beta * q.exp() + (1 - beta) * p.exp()).log()
    expected = beta * (q.exp() * (q - mixture)).sum() + (1 - beta) * (p.exp() * (p - mixture)).sum()
    torch.testing.assert_close(jsd(p[:, :-1], q[:, :-1], 1, beta), expected, atol=1e-5, rtol=1e-5)


def test_jsd_is_forward_kl_at_0_and_reverse_kl_at_1():
    p, q = topk_of(random_logprobs(3, 20, 4), random_logprobs(3, 20, 5), 4)
    assert jsd(p, q, 3, 0.0).item() == forward_kl(p, q, 3, 0.0).item()
    assert jsd(p, q, 3, 1.0).item() == reverse_kl(p, q, 3, 0.0).item()


def test_jsd_near_its_ends_points_where_the_two_kls_do():
    logits = random_logprobs(3, 20, 6)
    teacher = random_logprobs(3, 20, 7)

    def direction(divergence, beta):
        student_logits = logits.double().requires_grad_()
        p, q = topk_of(student_logits, teacher.double(), 4)
        return functional.normalize(torch.autograd.grad(divergence(p, q, 1, beta), student_logits)[0].flatten(), dim=0)

    assert direction(jsd, 1e-3) @ direction(forward_kl, 0.0) > 0.999
    assert direction(jsd, 1 - 1e-3) @ direction(reverse_kl, 0.0) > 0.999


def test_jsd_is_symmetric_at_one_half():
    p, q = topk_of(random_logprobs(3, 20, 8), random_logprobs(3, 20, 9), 4)
    torch.testing.assert_close(jsd(p, q, 3, 0.5), jsd(q, p, 3, 0.5))


@pytest.mark.parametrize("name", TOPK_NAMES)
@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_loss_and_gradient_are_zero_at_the_teacher(name, scale):
    teacher = random_logprobs(16, 50, 10, scale)
    logits = teacher.clone().requires_grad_()
    loss = TOPK_DIVERGENCES[name](*topk_of(logits, teacher, 8), 16, 0.4)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item()) < 1e-6
    assert gradient.norm().item() < 1e-6


def test_sampled_reverse_kl_and_its_gradient_are_zero_at_the_teacher():
    teacher = random_logprobs(16, 50, 11)
    logits = teacher.clone().requires_grad_()
    sampled = logits.log_softmax(-1)[:, 3]
    loss = sampled_reverse_kl(sampled, teacher[:, 3], teacher[:, 3], 16)
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, logits)[0].norm().item() < 1e-6


@pytest.mark.parametrize("vocabulary", [8, 50])
@pytest.mark.parametrize("is_stale", [False, True])
def test_the_expected_gradient_of_the_sampled_estimate_is_that_of_the_exact_reverse_kl(vocabulary, is_stale):
    logits = random_logprobs(1, vocabulary, 12).double().requires_grad_()
    teacher = random_logprobs(1, vocabulary, 13).double()
    student = logits.log_softmax(-1)
    rollout = random_logprobs(1, vocabulary, 14).double() if is_stale else student.detach()
    exact = torch.autograd.grad((student.exp() * (student - teacher)).sum(), logits)[0]
    expected = torch.zeros_like(exact)
    for token in range(vocabulary):  # every token the rollout worker could draw, weighed by its probability
        sampled = logits.log_softmax(-1)[:, token]
        loss = sampled_reverse_kl(sampled, rollout[:, token], teacher[:, token], 1)
        expected += rollout[0, token].exp() * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(expected, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TOPK_NAMES)
def test_the_gradient_is_that_of_the_same_divergence_between_bucketed_distributions(name):
    teacher = random_logprobs(6, 30, 15).double()
    logits = random_logprobs(6, 30, 16).double().requires_grad_()
    p, q = topk_of(logits, teacher, 5)
    (gradient,) = torch.autograd.grad(TOPK_DIVERGENCES[name](p, q, 1, 0.5), logits)
    p, q = (torch.cat([side.exp(), 1 - side.exp().sum(-1, keepdim=True)], -1) for side in topk_of(logits, teacher, 5))
    mixture = (p + q) / 2
    plain = {
        "reverse_kl": (p * (p / q).log()).sum(),
        "forward_kl": (q * (q / p).log()).sum(),
        "jsd": 0.5 * (p * (p / mixture).log()).sum() + 0.5 * (q * (q / mixture).log()).sum(),
    }[name]
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, logits)[0], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", TOPK_NAMES)
def test_mass_above_one_by_rounding_gives_finite_values_and_no_gradient_at_the_teacher(name):
    teacher = torch.tensor([[0.7, 0.3000003]]).log()
    student = teacher.clone().requires_grad_()
    loss = TOPK_DIVERGENCES[name](student, teacher, 1, 0.5)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-6
    assert gradient.norm().item() < 1e-6


@pytest.mark.parametrize("name", TOPK_NAMES)
def test_a_masked_student_logit_gives_finite_gradients(name):
    logits = torch.tensor([[1.0, -math.inf, 0.5, 0.0]], requires_grad=True)
    p, q = topk_of(logits, torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log(), 2)
    loss = TOPK_DIVERGENCES[name](p, q, 1, 0.5)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_a_masked_sampled_token_gives_finite_gradients():
    logits = torch.tensor([[1.0, -math.inf]], requires_grad=True)
    sampled = logits.log_softmax(-1)[:, 1]
    loss = sampled_reverse_kl(sampled, torch.tensor([-1.0]), torch.tensor([-2.0]), 1)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_no_completion_tokens_keep_the_graph_with_zero_gradients():
    weight = torch.ones(3, requires_grad=True)
    empty = (torch.empty(0, 3) * weight).sum(-1)
    for loss in [
        sampled_reverse_kl(empty, torch.empty(0), torch.empty(0), 0),
        *(divergence(empty[:, None], torch.empty(0, 1), 0, 0.5) for divergence in TOPK_DIVERGENCES.values()),
    ]:
        assert loss.item() == 0
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", TOPK_NAMES)
def test_two_halves_make_the_whole(name):
    p, q = topk_of(random_logprobs(10, 20, 17), random_logprobs(10, 20, 18), 4)
    divergence = TOPK_DIVERGENCES[name]
    halves = divergence(p[:3], q[:3], 10, 0.5) + divergence(p[3:], q[3:], 10, 0.5)
    torch.testing.assert_close(halves, divergence(p, q, 10, 0.5))
