"""Every estimator's expected gradient, by exact enumeration in float64, is that of the divergence it is named after.

One prefix, a small vocabulary: all tokens that the rollout worker could draw, weighed by its probabilities. The
identities are those of `docs/objective.md`.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learner.loss.builders import (
    evaluate,
    forward_kl,
    gradient_of,
    jsd,
    make_objective,
    make_tokens,
    random_logprobs,
    reverse_kl,
)

VOCABULARY = 11
LOGITS = random_logprobs(1, VOCABULARY, seed=0)
TARGET = random_logprobs(1, VOCABULARY, seed=1)
STALE = random_logprobs(1, VOCABULARY, seed=2, scale=0.4) + LOGITS  # a student of some steps ago
UNREACHED = {"low": 0.0, "high": 1e4}
NAMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": lambda student, target: jsd(student, target, 0.5),
}
Loss = Callable[[Tensor], Tensor]  # log-probabilities [1, vocabulary] -> [1]


def slope(loss: Loss, logits: Tensor = LOGITS) -> Tensor:
    """Return the gradient of a function of log-probabilities by the logits, [vocabulary]."""
    logits = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1)).sum(), logits)
    return gradient[0]


def expected_gradient(rollout: Tensor, term: dict[str, Any], **fields: Any) -> Tensor:
    """Return the mean gradient of a policy-gradient term over all tokens that the rollout worker may write."""
    objective = make_objective(**({"support": "sampled"} | fields), terms={"main": {"loss": "policy_gradient"} | term})
    rollout = rollout.log_softmax(-1)
    candidate_ids = None
    if objective.needs.num_candidates:
        candidate_ids = TARGET.topk(objective.needs.num_candidates).indices.expand(VOCABULARY, -1)
    models = {"teacher": TARGET.expand(VOCABULARY, -1)}
    every = torch.arange(VOCABULARY)
    tokens = make_tokens(
        every,
        models,
        rollout.expand(VOCABULARY, -1),
        candidate_ids,
        student_chose=objective.needs.candidates_from == "student",
        lengths=[1] * VOCABULARY,
    )
    results = evaluate(objective, LOGITS.expand(VOCABULARY, -1), tokens, models)
    return rollout.exp()[0] @ gradient_of(results)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Compare gradients to 1e-8, and make sure that there is something to compare."""
    assert expected.norm() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("importance", ["ratio", "icepop", "truncated", "sequence_mask", "ppo_clip"])
@pytest.mark.parametrize("rollout", [LOGITS, STALE], ids=["on-policy", "stale"])
def test_sampled_estimators_are_unbiased_for_rollouts_of_any_age(name: str, importance: str, rollout: Tensor) -> None:
    """I4, I6, I7, with bounds that no ratio reaches."""
    term = {"log_ratio_map": name, "importance": {"kind": importance} | UNREACHED}
    assert_same(expected_gradient(rollout, term), slope(lambda student: NAMED[name](student, TARGET)))


@pytest.mark.parametrize("name", NAMED)
def test_without_a_ratio_they_are_unbiased_on_policy_only(name: str) -> None:
    term = {"log_ratio_map": name, "importance": {"kind": "none"}}
    exact = slope(lambda student: NAMED[name](student, TARGET))
    assert_same(expected_gradient(LOGITS, term), exact)
    assert (expected_gradient(STALE, term) - exact).norm() > 0.01


@pytest.mark.parametrize("bounded", [{"kind": "ppo_clip", "low": 0.8, "high": 1.2}, {"kind": "truncated", "high": 1.1}])
def test_a_ratio_that_is_clipped_is_biased(bounded: dict[str, Any]) -> None:
    """I7."""
    exact = slope(lambda student: reverse_kl(student, TARGET))
    assert (expected_gradient(STALE, {"importance": bounded}) - exact).norm() > 0.01


def test_an_advantage_frozen_at_the_rollout_is_biased() -> None:
    """I7."""
    exact = slope(lambda student: reverse_kl(student, TARGET))
    assert (expected_gradient(STALE, {"student": "rollout"}) - exact).norm() > 0.05
    assert_same(expected_gradient(LOGITS, {"student": "rollout"}), exact)


@pytest.mark.parametrize(
    "support",
    [*({"support": kind, "support_size": 4} for kind in ("topk", "student_topk")), {"support": "full"}],
)
@pytest.mark.parametrize("rollout", [LOGITS, STALE], ids=["on-policy", "stale"])
def test_the_kl_baseline_changes_nothing_in_expectation(support: dict[str, Any], rollout: Tensor) -> None:
    """I8, for the exact KL and for the KL of a bucketed distribution alike."""
    found = expected_gradient(rollout, {"baseline": "kl"}, **support)
    assert_same(found, slope(lambda student: reverse_kl(student, TARGET)))


def test_the_exact_kl_baseline_makes_the_advantage_average_to_zero() -> None:
    """vOPD (arXiv 2605.07865): -KL is the mean of the log-ratio under the student."""
    objective = make_objective(
        support="full", terms={"main": {"loss": "policy_gradient", "baseline": "kl", "importance": {"kind": "none"}}}
    )
    models = {"teacher": TARGET.expand(VOCABULARY, -1)}
    tokens = make_tokens(torch.arange(VOCABULARY), models, LOGITS.expand(VOCABULARY, -1))
    losses = evaluate(objective, LOGITS.expand(VOCABULARY, -1), tokens, models).losses
    assert losses.abs().max() > 0.1
    assert (LOGITS.exp()[0] @ losses).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("rollout", [LOGITS, STALE], ids=["on-policy", "stale"])
def test_several_draws_with_replacement_are_unbiased(name: str, rollout: Tensor) -> None:
    """AsyncOPD (arXiv 2606.24143): all triples of draws, the first of them written."""
    vocabulary, draws = 5, 3
    logits, target = LOGITS[:, :vocabulary], TARGET[:, :vocabulary].log_softmax(-1)
    rollout = rollout[:, :vocabulary].log_softmax(-1)
    triples = torch.tensor(list(itertools.product(range(vocabulary), repeat=draws)))
    n = len(triples)
    objective = make_objective(
        support="samples",
        support_size=draws,
        terms={"main": {"loss": "policy_gradient", "over": "support", "log_ratio_map": name}},
    )
    tokens = make_tokens(
        triples[:, 0], {"teacher": target.expand(n, -1)}, rollout.expand(n, -1), triples[:, 1:], student_chose=True
    )
    gradients = gradient_of(evaluate(objective, logits.expand(n, -1), tokens))
    found = rollout[0][triples].sum(-1).exp() @ gradients
    assert_same(found, slope(lambda student: NAMED[name](student, target), logits))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("rollout", [LOGITS, STALE], ids=["on-policy", "stale"])
def test_a_sum_over_the_student_s_top_k_has_the_gradient_of_the_generalized_divergence(
    name: str, rollout: Tensor
) -> None:
    """Over all tokens it is the whole divergence; at p = q it vanishes on every part of the vocabulary."""
    divergence = {"identity": "reverse_kl", "forward_kl": "forward_kl", "jsd": "jsd"}[name]
    exact = {"loss": "divergence", "divergence": divergence, "truncation": "generalized"}
    drawn = {"loss": "policy_gradient", "over": "support", "log_ratio_map": name}
    ids = rollout.topk(4).indices
    tokens = make_tokens(torch.tensor([0]), {"teacher": TARGET}, rollout.log_softmax(-1), ids, student_chose=True)
    first, second = (
        gradient_of(
            evaluate(make_objective(support="student_topk", support_size=4, terms={"main": term}), LOGITS, tokens)
        )
        for term in (exact, drawn)
    )
    assert_same(second, first)


# Whole trajectories


def test_returns_to_go_have_the_gradient_of_the_sequence_s_reverse_kl() -> None:
    """I5 (MiniLLM), by all trajectories of two tokens; the immediate term alone leaves some of it out."""
    size = 4
    logits = random_logprobs(size + 1, size, seed=3)  # of the first token, and of the second after each first
    target = random_logprobs(size + 1, size, seed=4)

    def sequence_kl(z: Tensor) -> Tensor:
        student = z.log_softmax(-1)
        joint, joint_target = (side[0, :, None] + side[1:] for side in (student, target))
        return (joint.exp() * (joint - joint_target)).sum()

    z = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(sequence_kl(z), z)
    pairs = torch.tensor(list(itertools.product(range(size), repeat=2)))
    rows = torch.stack([torch.zeros(len(pairs), dtype=torch.long), pairs[:, 0] + 1], dim=-1).flatten()
    weights = torch.repeat_interleave(logits[0][pairs[:, 0]].exp() * logits[pairs[:, 0] + 1, pairs[:, 1]].exp(), 2)

    def estimate(**term: Any) -> Tensor:
        support = {"support": "full"} if "baseline" in term else {"support": "sampled"}
        objective = make_objective(**support, terms={"main": {"loss": "policy_gradient"} | term})
        models = {"teacher": target[rows]}
        tokens = make_tokens(pairs.flatten(), models, logits[rows], lengths=[2] * len(pairs))
        gradient = gradient_of(evaluate(objective, logits[rows], tokens, models)) * weights[:, None]
        return torch.zeros_like(logits).index_add_(0, rows, gradient)

    assert_same(estimate(discount=1.0), exact)
    assert_same(estimate(discount=1.0, baseline="kl"), exact)
    assert (estimate() - exact).norm() > 0.01


# What others do, and what it optimises


def drawn_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the expected gradient of differentiating a function of log p(y) and log q(y), y drawn from p."""
    probabilities = LOGITS.log_softmax(-1).exp()
    return slope(lambda student: (probabilities * loss(student, TARGET)).sum(-1))


def test_k1_differentiated_directly_teaches_nothing() -> None:
    assert drawn_loss(lambda student, target: student - target).norm() < 1e-12


def test_k2_differentiated_directly_is_the_reverse_kl() -> None:
    assert_same(
        drawn_loss(lambda student, target: (student - target).square() / 2),
        slope(lambda student: reverse_kl(student, TARGET)),
    )


def test_k3_differentiated_directly_is_the_forward_kl() -> None:
    found = drawn_loss(lambda student, target: (target - student).exp() - 1 - (target - student))
    assert_same(found, slope(lambda student: forward_kl(student, TARGET)))
    assert (found - slope(lambda student: reverse_kl(student, TARGET))).norm() > 0.05


def test_the_value_of_an_f_divergence_is_no_advantage() -> None:
    """I6: -f(u) instead of -f(u) + u f'(u) is another gradient, for forward KL and Jensen-Shannon divergence."""
    u = (TARGET - LOGITS).exp()
    values = {"forward_kl": u * u.log(), "jsd": (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2}
    for name, value in values.items():
        wrong = slope(lambda student, value=value: (LOGITS.exp() * value * student).sum(-1))  # type: ignore[misc]
        right = slope(lambda student, name=name: NAMED[name](student, TARGET))  # type: ignore[misc]
        assert (wrong - right).norm() > 0.01


def test_a_divergence_as_the_advantage_of_a_whole_position_teaches_nothing() -> None:
    kl = reverse_kl(LOGITS, TARGET)
    assert slope(lambda student: (LOGITS.exp() * kl * student).sum(-1)).norm() < 1e-12


def test_the_gradient_of_the_reverse_kl_has_no_plus_one() -> None:
    """I1."""
    log_ratio = LOGITS - TARGET
    assert_same(
        slope(lambda student: (LOGITS.exp() * log_ratio * student).sum(-1)),
        slope(lambda student: reverse_kl(student, TARGET)),
    )
