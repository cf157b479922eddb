"""Which terms of an objective count at which token, and how much."""

import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import PRESETS, expand_preset
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from tests.learner.loss.builders import (
    LENGTHS,
    VOCABULARY,
    evaluate,
    gradient_of,
    make_objective,
    make_tokens,
    random_case,
    small,
    with_scores,
    written,
)

GENERALIZED_KL = {"loss": "divergence", "divergence": "reverse_kl", "truncation": "generalized"}


def one_token(**columns: Any) -> tuple[Tensor, CompletionTokens]:
    """Return a student that says (1/4, 3/4) and a teacher that says (1/2, 1/2) of a token that is written as 0."""
    student, teacher = (torch.tensor([values], dtype=torch.float64).log() for values in ((0.25, 0.75), (0.5, 0.5)))
    tokens = make_tokens(torch.tensor([0]), {"teacher": teacher}, student, torch.tensor([[0, 1]]))
    return student, replace(tokens, **columns)


def loss_of(term: dict[str, Any], tokens: CompletionTokens, student: Tensor, **fields: Any) -> float:
    """Return the loss of one token under one term."""
    table = {"support": "topk", "support_size": 2, "terms": {"main": term}} | fields
    return evaluate(make_objective(**table), student, tokens).losses.item()


@pytest.mark.parametrize(
    ("when", "is_student_lower", "holds"),
    [
        ("always", True, True),
        ("log_ratio_positive", True, True),
        ("log_ratio_not_positive", True, False),
        ("log_ratio_positive", False, False),
        ("log_ratio_not_positive", False, True),
        ("teacher_entropy_above", True, False),
        ("teacher_entropy_below", True, True),
    ],
)
def test_a_term_counts_where_its_condition_holds(when: str, is_student_lower: bool, holds: bool) -> None:
    """The teacher's entropy is log 2 = 0.69, below the threshold of 0.8."""
    student, tokens = one_token(uniform=torch.tensor([0.4]))
    if not is_student_lower:
        student = student.flip(-1)
    expected = loss_of(GENERALIZED_KL, tokens, student) if holds else 0.0
    assert loss_of(GENERALIZED_KL | {"when": when}, tokens, student) == expected
    assert loss_of(GENERALIZED_KL, tokens, student) > 0.1


def test_the_threshold_itself_counts_as_below() -> None:
    student, tokens = one_token()
    tokens = with_scores(tokens, entropy={"teacher": torch.tensor([0.75])})
    assert loss_of(GENERALIZED_KL | {"when": "teacher_entropy_above", "threshold": 0.75}, tokens, student) == 0
    assert loss_of(GENERALIZED_KL | {"when": "teacher_entropy_below", "threshold": 0.75}, tokens, student) > 0


@pytest.mark.parametrize(
    ("probability_of_the_student", "uniform", "is_trusted"),
    [(0.8, 0.62, True), (0.8, 0.63, False), (0.5, 0.99, True), (0.25, 0.99, True)],
)
def test_a_token_is_trusted_with_the_probability_target_over_student(
    probability_of_the_student: float, uniform: float, is_trusted: bool
) -> None:
    student = torch.tensor([[probability_of_the_student, 1 - probability_of_the_student]]).log()
    _, tokens = one_token(uniform=torch.tensor([uniform]))  # teacher 0.5: min(0.5 / 0.8, 1) = 0.625
    trusted, untrusted = (
        loss_of({"loss": "task_reward", "when": when}, replace(tokens, task_advantage=torch.tensor([1.0])), student)
        for when in ("trusted", "untrusted")
    )
    assert (trusted != 0) == is_trusted
    assert (untrusted == 0) == is_trusted


def test_terms_are_weighted_and_added() -> None:
    student, tokens = one_token(task_advantage=torch.tensor([2.0]), rollout_logprobs=torch.tensor([0.5]).log())
    reward = {"loss": "task_reward", "weight": 3.0}
    alone = loss_of(GENERALIZED_KL | {"weight": 0.5}, tokens, student)
    # Ratio 0.25 / 0.5, advantage 2, weight 3.
    assert loss_of(reward, tokens, student) == pytest.approx(-3.0)
    both = make_objective(support="topk", support_size=2, terms={"a": GENERALIZED_KL | {"weight": 0.5}, "b": reward})
    assert evaluate(both, student, tokens).losses.item() == pytest.approx(alone - 3.0)


def test_weights_and_conditions_count_over_the_whole_vocabulary_too() -> None:
    """Two divergences and a policy gradient, each by the textbook; every condition holds at some tokens."""
    _, logits, tokens, models = random_case("gkd")
    base = {"loss": "divergence", "divergence": "forward_kl", "target": {"base": 1.0}}
    terms: dict[str, dict[str, Any]] = {
        "alone": {"loss": "divergence", "weight": 0.5, "when": "log_ratio_positive"},
        "second": base | {"weight": 2.0, "when": "teacher_entropy_below", "threshold": 1.8},
        "third": {"loss": "policy_gradient", "weight": 3.0, "when": "trusted", "importance": {"kind": "none"}},
    }
    leaf = logits.clone().requires_grad_()
    p, q, other = leaf.log_softmax(-1), models["teacher"], models["base"]
    sampled = written(p, tokens.target_ids)
    advantage = (tokens.logprobs["teacher"] - sampled).detach()
    chosen = {
        "alone": advantage > 0,
        "second": tokens.teacher_entropy <= 1.8,
        "third": tokens.uniform < advantage.clamp(max=0).exp(),
    }
    losses = {
        "alone": (p.exp() * (p - q)).sum(-1),
        "second": (other.exp() * (other - p)).sum(-1),
        "third": -advantage * (sampled - sampled.detach()).exp(),
    }
    early = (tokens.position < 5).double()
    for names in (["alone"], ["alone", "second"], ["alone", "second", "third"]):
        expected = early * sum(terms[name].get("weight", 1.0) * chosen[name] * losses[name] for name in names)
        (gradient,) = torch.autograd.grad(expected.sum(), leaf, retain_graph=True)
        objective = make_objective(
            support="full", terms={name: terms[name] for name in names}, token_weights={"first_tokens": 5}
        )
        results = evaluate(objective, logits, tokens, models)
        torch.testing.assert_close(results.losses, expected.detach())
        torch.testing.assert_close(gradient_of(results), gradient)
    for name, holds in chosen.items():
        assert 0 < holds[tokens.position < 5].sum() < (tokens.position < 5).sum(), name


def test_token_weights_multiply_every_term() -> None:
    objective, logits, tokens, models = random_case("opd-grpo")
    plain = evaluate(objective, logits, tokens, models)
    weighted = make_objective(
        "opd-grpo", token_weights={"first_tokens": 3, "first_fraction": 0.5, "position_importance": 1.0}
    )
    results = evaluate(weighted, logits, tokens, models)
    size = (tokens.logprobs["teacher"] - plain.logprobs).abs()[: LENGTHS[0]]
    importance = 2 - (size.cumsum(0) - size) / size.sum()
    expected = plain.losses[: LENGTHS[0]] * importance * torch.tensor([1, 1, 1, 0, 0, 0, 0])
    torch.testing.assert_close(results.losses[: LENGTHS[0]], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_of(results)[1], gradient_of(plain)[1] * importance[1], atol=1e-6, rtol=0)


def test_skipped_and_ignored_tokens_pull_nothing_and_the_others_as_before() -> None:
    objective, logits, tokens, models = random_case("opd-grpo")
    plain = evaluate(objective, logits, tokens, models)
    ignored = int(tokens.target_ids[3])
    config = msgspec.convert(expand_preset({"preset": "opd-grpo", "token_weights": {"skip_first": 2}}), ObjectiveConfig)
    results = evaluate(Objective(config, ignored_ids={ignored, VOCABULARY}), logits, tokens, models)
    counts = (tokens.position >= 2) & (tokens.target_ids != ignored)
    assert counts[:7].tolist()[:4] == [False, False, True, False]
    torch.testing.assert_close(results.losses, plain.losses * counts)
    torch.testing.assert_close(gradient_of(results), gradient_of(plain) * counts[:, None])


def test_entropy_weights_use_the_models_that_are_asked_for() -> None:
    objective, logits, tokens, models = random_case("thinking-machines")
    plain = evaluate(objective, logits, tokens, models)
    found = {}
    for which in ("teacher", "student", "both"):
        weighted = make_objective("thinking-machines", token_weights={"entropy": which})
        assert weighted.needs.first_pass == (which != "teacher")
        found[which] = evaluate(weighted, logits, tokens, models).losses / plain.losses
    sure, unsure = (entropy / entropy[:7].max() for entropy in (tokens.teacher_entropy[:7], plain.entropy[:7]))
    for which, weights in {"teacher": 2 - sure, "student": 1 + unsure, "both": (2 - sure) * (1 + unsure)}.items():
        torch.testing.assert_close(found[which][:7], weights / weights.mean(), atol=1e-6, rtol=0)


def test_a_whole_text_that_the_student_no_longer_recognises_counts_nothing() -> None:
    mask = {"kind": "sequence_mask", "low": 0.5, "high": 2.0}
    objective = make_objective(support="sampled", terms={"main": {"loss": "policy_gradient", "importance": mask}})
    _, logits, tokens, _ = random_case("thinking-machines")
    rollout = written(logits.log_softmax(-1), tokens.target_ids).clone()
    rollout[7] -= math.log(2.1)  # the trajectory of one token
    rollout[8:] += torch.tensor([2.0, -2.0, 0.5, -0.5], dtype=torch.float64)  # 1 in geometric mean
    results = evaluate(objective, logits, replace(tokens, rollout_logprobs=rollout))
    assert objective.needs.first_pass
    assert results.losses[7] == 0
    assert gradient_of(results)[7].abs().max() == 0
    assert (results.losses[:7] != 0).all()
    assert (results.losses[8:] != 0).all()


def test_what_needs_whole_trajectories_says_so_and_refuses_to_go_without() -> None:
    for preset in PRESETS:
        assert small(preset).needs.first_pass == (preset in ("minillm", "iw-opd", "beta-opsd-returns"))
    for student in ("rollout", "none"):
        term = {"loss": "policy_gradient", "discount": 0.5, "student": student}
        assert not make_objective(support="sampled", terms={"main": term}).needs.first_pass
    objective, _, tokens, _ = random_case("minillm")
    with pytest.raises(ValueError, match="pass first_pass"):
        objective.plan(tokens, None)


def test_later_advantages_are_those_of_the_term_s_own_divisor() -> None:
    _, logits, tokens, _ = random_case("thinking-machines")
    term = {"loss": "policy_gradient", "discount": 1.0, "importance": {"kind": "none"}, "student": "none"}
    results = evaluate(make_objective(support="sampled", terms={"main": term}), logits, tokens)
    log_target = tokens.logprobs["teacher"][:7]
    torch.testing.assert_close(results.losses[:7], -log_target.flip(0).cumsum(0).flip(0))


@pytest.mark.parametrize("rollout_probability", [0.2, 0.4])
def test_a_sampled_token_outside_the_support_adds_what_the_bucket_leaves_out(rollout_probability: float) -> None:
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.2, 0.5, 0.1, 0.2]], dtype=torch.float64).log()
    bucketed = 0.4 * math.log(0.4 / 0.2) + 0.3 * math.log(0.3 / 0.5)  # the tails are alike, 0.3
    baseline = 4 / 7 * math.log((4 / 7) / (2 / 7)) + 3 / 7 * math.log((3 / 7) / (5 / 7))  # the candidates by themselves
    outside = 0.2 / rollout_probability * (math.log((0.2 / 0.3) / (0.1 / 0.3)) - baseline)
    objective = make_objective("tail-topk", support_size=2)
    for sampled, residual in [(0, 0.0), (1, 0.0), (2, outside)]:
        tokens = make_tokens(torch.tensor([sampled]), {"teacher": teacher}, candidate_ids=torch.tensor([[0, 1]]))
        tokens = replace(tokens, rollout_logprobs=torch.tensor([rollout_probability], dtype=torch.float64).log())
        found = evaluate(objective, student, tokens).losses.item()
        assert found == pytest.approx(bucketed + 0.3 * baseline + residual)


def test_a_term_counts_outside_of_the_support_alone() -> None:
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    # The student's two most likely are 0 and 1, so token 2 takes no part in an intersection, nor does 0.
    for support, outside in [("topk", {0, 3}), ("intersection", {0, 2, 3})]:
        term = {"loss": "policy_gradient", "when": "outside_support", "importance": {"kind": "none"}}
        objective = make_objective(support=support, support_size=2, terms={"main": term})
        for sampled in range(4):
            tokens = make_tokens(torch.tensor([sampled]), {"teacher": teacher}, candidate_ids=torch.tensor([[1, 2]]))
            expected = float(student[0, sampled] - teacher[0, sampled]) if sampled in outside else 0.0
            assert evaluate(objective, student, tokens).losses.item() == pytest.approx(expected)


def test_candidates_outside_the_student_s_most_likely_do_not_count_in_an_intersection() -> None:
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.5, 0.3, 0.1]], dtype=torch.float64).log()
    tokens = make_tokens(torch.tensor([0]), {"teacher": teacher}, candidate_ids=torch.tensor([[1, 2]]))
    for truncation, expected in [
        ("renormalized", 0.0),  # token 1 alone
        ("generalized", 0.3 * math.log(0.3 / 0.5) - 0.3 + 0.5),
        ("tail", 0.3 * math.log(0.3 / 0.5) + 0.7 * math.log(0.7 / 0.5)),
    ]:
        term = GENERALIZED_KL | {"truncation": truncation, "residual": False}
        objective = make_objective(support="intersection", support_size=2, terms={"main": term})
        assert evaluate(objective, student, tokens).losses.item() == pytest.approx(expected)


def test_a_term_learns_from_the_rows_that_it_names() -> None:
    """The student says 1/4 of the written token, so its cross-entropy is log 4."""
    student, tokens = one_token()
    term = {"loss": "cross_entropy"}
    for is_privileged, expected in (
        (True, {"all": 1, "privileged": 1, "student": 0}),
        (False, {"student": 1, "privileged": 0}),
    ):
        of_row = replace(tokens, privileged=torch.tensor([is_privileged]))
        for rows, holds in expected.items():
            assert loss_of(term | {"rows": rows}, of_row, student) == pytest.approx(holds * math.log(4))
    assert loss_of(term | {"rows": "privileged"}, tokens, student) == 0  # the student wrote all


def test_a_privileged_row_is_learned_from_with_the_ratio_to_its_sampler() -> None:
    """Its sampler gave the token 1/2, the student 1/4 and the teacher 1/2: ratio 1/2 of advantage log 2."""
    student, tokens = one_token(rollout_logprobs=torch.tensor([0.5]).log(), privileged=torch.tensor([True]))
    term = {"loss": "policy_gradient", "importance": {"kind": "truncated"}, "rows": "privileged"}
    assert loss_of(term, tokens, student) == pytest.approx(-0.5 * math.log(2))
    assert loss_of(term | {"rows": "student"}, tokens, student) == 0
