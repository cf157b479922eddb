"""Our objectives against values and statements that others published; each test names its source."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.loss.divergences import to_buckets, with_tail
from learner.loss.tokens import CompletionTokens
from tests.learner.loss.builders import (
    BUCKET_DIVERGENCES,
    evaluate,
    forward_kl,
    gradient_of,
    jsd,
    make_objective,
    make_tokens,
    random_logprobs,
    reverse_kl,
)

TRUNCATIONS = ["generalized", "renormalized", "tail"]


def log(*probabilities: float) -> Tensor:
    """Return log-probabilities of one token position, [1, k]."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


# Values


def test_student_support_reverse_kl_of_miles() -> None:
    """Miles, tests/fast/rollout/test_on_policy_distillation.py: p = (.6, .4), q = (.3, .7), to 1e-6."""
    expected = 0.6 * math.log(2) + 0.4 * math.log(0.4 / 0.7)
    tokens = make_tokens(
        torch.tensor([0]), {"teacher": log(0.3, 0.7)}, log(0.6, 0.4), torch.tensor([[0, 1]]), student_chose=True
    )
    for truncation in TRUNCATIONS:
        term = {"loss": "divergence", "truncation": truncation}
        objective = make_objective(support="student_topk", support_size=2, terms={"main": term})
        assert evaluate(objective, log(0.6, 0.4), tokens).losses.item() == pytest.approx(expected, abs=1e-6)


def test_the_advantage_of_miles() -> None:
    """Miles, test_opd.py: advantages [2, 2] minus 0.5 (student - teacher), student [0, 1], teacher [0, 0]: [2, 1.5]."""
    student = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).log_softmax(-1)
    drawn = torch.tensor([0, 0])
    logprobs = student[:, 0]
    teacher = logprobs - torch.tensor([0.0, 1.0])
    tokens = make_tokens(
        drawn, {"teacher": student}, student, logprobs={"teacher": teacher}, task_advantage=torch.tensor([2.0, 2.0])
    )
    none: dict[str, Any] = {"importance": {"kind": "none"}}
    objective = make_objective(
        support="sampled",
        terms={"reward": {"loss": "task_reward"} | none, "opd": {"loss": "policy_gradient", "weight": 0.5} | none},
    )
    assert evaluate(objective, student, tokens).losses.tolist() == pytest.approx([-2.0, -1.5], abs=1e-6)


def test_uniform_student_and_teacher_have_no_divergence() -> None:
    """TRL, TestGeneralizedJSDLoss: uniform distributions give 0 to 5 decimals, identical to 6; symmetric at 0.5."""
    uniform, other = log(0.25, 0.25, 0.25, 0.25), log(0.7, 0.1, 0.1, 0.1)
    assert jsd(uniform, uniform, 0.5).item() == pytest.approx(0, abs=1e-6)
    assert jsd(uniform, other, 0.5).item() == pytest.approx(jsd(other, uniform, 0.5).item(), abs=1e-6)


def test_sampled_reverse_kl_is_the_policy_gradient_of_thinking_machines() -> None:
    """tinker-cookbook, train_on_policy.py: loss -ratio A with A = log teacher - log sampler when on-policy."""
    logits = random_logprobs(3, 7, seed=0)
    teacher = random_logprobs(3, 7, seed=1)
    drawn = torch.tensor([2, 0, 5])
    results = evaluate(make_objective("thinking-machines"), logits, make_tokens(drawn, {"teacher": teacher}, logits))
    rows = torch.arange(3)
    advantage = teacher[rows, drawn] - logits[rows, drawn]
    torch.testing.assert_close(results.losses, -advantage)
    one_hot = torch.nn.functional.one_hot(drawn, 7)
    torch.testing.assert_close(gradient_of(results), -advantage[:, None] * (one_hot - logits.exp()))


def test_proximal_teacher_keeps_its_lower_bound() -> None:
    """TOP-D (arXiv 2607.04751): log(alpha q/p + 1 - alpha) never falls below log(1 - alpha)."""
    student, teacher = log(0.999, 0.001), log(1e-9, 1 - 1e-9)
    tokens = make_tokens(torch.tensor([0]), {"teacher": teacher}, student)
    assert evaluate(make_objective("top-d"), student, tokens).losses.item() == pytest.approx(-math.log(0.9), abs=1e-6)


# Truncation


def test_tail_bucket_divergence_is_at_most_the_full_one() -> None:
    """Merging tokens into a bucket can only lose information (log-sum inequality; arXiv 2605.11182 A.3)."""
    student, teacher = random_logprobs(2, 64, 50, seed=2)
    ids = teacher.topk(8).indices
    for name, divergence in BUCKET_DIVERGENCES.items():
        full = divergence(student, teacher, 0.3)
        bucketed = divergence(with_tail(student.gather(-1, ids)), with_tail(teacher.gather(-1, ids)), 0.3)
        assert (bucketed > 0).all(), name
        assert (bucketed <= full).all(), name


def test_top_k_divergences_converge_to_the_full_one_as_k_grows() -> None:
    """AsyncOPD, tests/test_kl_loss.py: sparse KL tends to full KL with k (atol 1e-4, rtol 1e-3 at k = V)."""
    student, teacher = random_logprobs(2, 32, 100, seed=3)
    full = forward_kl(student, teacher).sum().item()
    for truncation in ("generalized", "tail"):
        errors = []
        for k in (4, 16, 64, 100):
            ids = teacher.topk(k).indices
            p, q = (to_buckets(side.gather(-1, ids), None, truncation) for side in (student, teacher))
            errors.append(abs(forward_kl(p, q).sum().item() - full))
        assert errors == sorted(errors, reverse=True), truncation
        assert errors[-1] == pytest.approx(0, abs=1e-3 * full + 1e-4), truncation


def test_the_tail_bucket_completes_the_distribution() -> None:
    """Miles 1322 and SDPO use K + 1 buckets; they must sum to 1 for the result to be a divergence."""
    topk = random_logprobs(16, 40, seed=4).topk(8).values
    torch.testing.assert_close(with_tail(topk).exp().sum(-1), torch.ones(16, dtype=torch.float64))


def test_stop_gradient_top_k_has_the_gradient_of_the_generalized_form() -> None:
    """I3: Many Faces (arXiv 2605.11182) eq. 12 against MOPD (arXiv 2606.30406) eq. 5, the same gradient."""
    logits, teacher = random_logprobs(4, 20, seed=5), random_logprobs(4, 20, seed=6)
    ids = teacher.topk(6).indices
    leaf = logits.clone().requires_grad_()
    student = leaf.log_softmax(-1).gather(-1, ids)
    stop_gradient = -(student.exp() * (teacher.gather(-1, ids) - student.detach())).sum()
    (expected,) = torch.autograd.grad(stop_gradient, leaf)
    tokens = make_tokens(torch.zeros(4, dtype=torch.long), {"teacher": teacher}, candidate_ids=ids)
    results = evaluate(make_objective("generalized-topk", support_size=6), logits, tokens)
    torch.testing.assert_close(gradient_of(results), expected, atol=1e-12, rtol=0)
    assert (results.losses > 0).all()


def raw_truncated_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum over some tokens of p log(p / q): what this project does not offer."""
    return (student.exp() * (student - teacher)).sum(-1)


def test_the_raw_truncated_sum_moves_a_student_that_equals_its_teacher() -> None:
    """I2: Many Faces eq. 8: truncation leaves p (log p/q + 1), which is not 0 at p = q."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -2.0]], dtype=torch.float64).requires_grad_()
    topk = logits.log_softmax(-1)[:, :3]
    (raw,) = torch.autograd.grad(raw_truncated_reverse_kl(topk, topk.detach()).sum(), logits, retain_graph=True)
    (of_the_mass,) = torch.autograd.grad(topk.exp().sum(), logits)
    torch.testing.assert_close(raw, of_the_mass)
    assert raw.norm() > 0.05


def test_the_raw_truncated_sum_is_least_outside_the_support() -> None:
    """Un-normalised top-k reverse KL is below 0, its value at the teacher, once the student has left the support."""
    teacher = log(0.5, 0.3)
    left = log(0.1, 0.1)
    assert raw_truncated_reverse_kl(left, teacher).item() < -0.1
    assert reverse_kl(left, teacher).item() > 0.1


def test_direct_opd_leaves_a_student_that_equals_its_target() -> None:
    """Teacher over base times initial student, normalised; two candidates and a tail of one token."""
    q, base, initial = log(0.5, 0.3, 0.2), log(0.2, 0.3, 0.5), log(0.4, 0.4, 0.2)
    student = (q - base + initial).log_softmax(-1)
    models = {"teacher": q, "base": base, "initial_student": initial}
    tokens = make_tokens(torch.tensor([0]), models, student, torch.tensor([[0, 1]]), student_chose=True)
    objective = make_objective("direct-opd", support_size=2)
    assert gradient_of(evaluate(objective, student, tokens)).abs().max() < 1e-12
    assert gradient_of(evaluate(objective, initial, tokens)).abs().max() > 0.05


def test_rethinking_is_the_token_reward_of_thunlp() -> None:
    """thunlp/OPD, student_p: -(log p_old - log q) softmax(log p_old over the top-k), in PPO's surrogate per token."""
    old, teacher, change = (random_logprobs(1, 9, seed=seed, scale=1.0) for seed in (12, 13, 15))
    student = (old + change).log_softmax(-1)
    ids = old.topk(4).indices
    tokens = make_tokens(torch.tensor([0]), {"teacher": teacher}, old, ids, student_chose=True)
    results = evaluate(make_objective("rethinking", support_size=4), student, tokens)
    leaf = student.clone().requires_grad_()
    new, before, of_teacher = (values.gather(-1, ids) for values in (leaf.log_softmax(-1), old, teacher))
    advantage = -(before - of_teacher) * before.softmax(-1)
    ratio = (new - before).exp()
    losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2))
    losses = torch.where(advantage < 0, torch.minimum(losses, -3.0 * advantage), losses)
    (expected,) = torch.autograd.grad(losses.sum(), leaf)
    torch.testing.assert_close(results.losses, losses.sum(-1).detach())
    torch.testing.assert_close(gradient_of(results), expected)
    assert (ratio < 0.8).any()
    assert (ratio > 1.2).any()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_vopd_takes_the_kl_over_the_top_k_off_each_sample(temperature: float) -> None:
    """vOPD (arXiv 2605.07865): the advantage is log q - log p + KL(p || q), over the student's top-k and the rest."""
    student, teacher = random_logprobs(9, 9, seed=8, scale=1.0)[:1], random_logprobs(1, 9, seed=9, scale=1.0)
    sampler, ids = (student / temperature).log_softmax(-1), student.topk(4).indices
    models = {"teacher": teacher.expand(9, -1)}
    tokens = make_tokens(torch.arange(9), models, sampler.expand(9, -1), ids.expand(9, -1), student_chose=True)
    results = evaluate(make_objective("vopd", temperature, support_size=4), student.expand(9, -1), tokens)
    kl = reverse_kl(with_tail(student.gather(-1, ids)), with_tail(teacher.gather(-1, ids)))
    expected = -(student - sampler).exp() * (teacher - student + kl)
    torch.testing.assert_close(results.losses, expected[0])


@pytest.mark.parametrize("preset", ["ppo-k1", "thinking-machines-frozen", "icepop", "mopd"])
def test_a_student_that_equals_its_teacher_stays_at_any_sampling_temperature(preset: str) -> None:
    student = log(0.6, 0.3, 0.1).expand(3, -1)
    for temperature in (0.7, 1.3):
        sampler = (student / temperature).log_softmax(-1)
        tokens = make_tokens(torch.arange(3), {"teacher": student}, sampler)
        results = evaluate(make_objective(preset, temperature), student, tokens)
        assert gradient_of(results).abs().max() < 1e-12
        torch.testing.assert_close(results.sampler_logprobs, sampler[0])


SCHEMES = [*TRUNCATIONS, "policy_gradient", "exact"]


def step_of(scheme: str, k: int, teacher: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the gradient by the logits of a reverse KL to the teacher, as the scheme truncates it."""
    n, ids = len(teacher), teacher.topk(k).indices
    if scheme == "raw":

        def raw(logits: Tensor) -> Tensor:
            leaf = logits.clone().requires_grad_()
            loss = raw_truncated_reverse_kl(leaf.log_softmax(-1).gather(-1, ids), teacher.gather(-1, ids))
            return torch.autograd.grad(loss.sum(), leaf)[0]

        return raw
    if scheme == "exact":
        objective = make_objective("exact-reverse-kl")
    elif scheme == "policy_gradient":
        objective = make_objective("direct-opd", support_size=k, terms={"main": {"target": {"teacher": 1.0}}})
    else:
        objective = make_objective("tail-topk", support_size=k, terms={"main": {"truncation": scheme}})
    tokens: CompletionTokens = make_tokens(
        torch.zeros(n, dtype=torch.long), {"teacher": teacher}, teacher, ids, student_chose=scheme == "policy_gradient"
    )
    return lambda logits: gradient_of(evaluate(objective, logits, tokens, {"teacher": teacher}))


@pytest.mark.parametrize("k", [3, 10, 20])
def test_a_student_that_equals_its_teacher_stays_there_for_200_steps_and_drifts_under_the_raw_sum(k: int) -> None:
    """Many Faces, section on top-k collapse: K from 5 to 20 does not help the raw sum; its fixes stay."""
    teacher = random_logprobs(16, 64, seed=7)
    drift = {}
    for scheme in ["raw", *SCHEMES]:
        gradient, logits = step_of(scheme, k, teacher), teacher.clone()
        for _ in range(200):
            logits -= 0.5 * gradient(logits)
        drift[scheme] = reverse_kl(logits.log_softmax(-1), teacher).mean().item()
    assert drift["raw"] > 0.1
    for scheme in SCHEMES:
        assert drift[scheme] < 1e-12, scheme


def test_a_masked_batch_gives_no_gradient_but_keeps_its_shape() -> None:
    """TRL, TestChunkedDivergenceLoss: a fully masked batch has loss 0 and gradients that exist."""
    none = torch.empty(0, 5)
    tokens = make_tokens(
        torch.empty(0, dtype=torch.long), {"teacher": none}, candidate_ids=torch.empty(0, 3, dtype=torch.long)
    )
    results = evaluate(make_objective("tail-topk", support_size=3), none, tokens)
    assert results.losses.sum().item() == 0
    assert gradient_of(results).shape == (0, 5)
