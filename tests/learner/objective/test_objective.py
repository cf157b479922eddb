"""Whole objectives, from the configuration to the gradient by the logits."""

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.contracts.presets import PRESETS
from learner.objective.divergences import jsd
from learner.objective.objective import Objective
from learner.objective.softmax import CPU_BLOCK_ELEMENTS
from learner.objective.tokens import CompletionTokens, StudentFacts, TokenPlan
from tests.learner.objective.builders import (
    evaluate,
    first_pass,
    gradient_of,
    make_objective,
    make_tokens,
    random_logprobs,
    written,
)

VOCABULARY = 40
LENGTHS = [7, 1, 4]
TOKENS = sum(LENGTHS)
MODELS = ("teacher", "base", "initial_student")
DIVERGENCE_PRESETS = [
    name
    for name, table in PRESETS.items()
    if all(term["loss"] == "divergence" and "when" not in term for term in table["terms"].values())
]
GENERALIZED_KL = {"loss": "divergence", "divergence": "reverse_kl", "truncation": "generalized"}


def small(preset: str) -> Objective:
    """Return the preset with a support that is smaller than the vocabulary of these tests."""
    return make_objective(preset, **({} if PRESETS[preset]["support"] in ("sampled", "full") else {"support_size": 6}))


def tokens_of(
    objective: Objective, models: dict[str, Tensor], rollout: Tensor | None = None, **columns: Tensor
) -> CompletionTokens:
    """Draw written tokens and candidates as the objective's support has them."""
    rollout = models["teacher"] if rollout is None else rollout
    n, generator = len(rollout), torch.Generator().manual_seed(0)
    num_candidates = objective.config.num_candidates
    candidate_ids = torch.zeros(n, 0, dtype=torch.long)
    if objective.config.support == "samples":
        candidate_ids = torch.multinomial(rollout.exp(), num_candidates, replacement=True, generator=generator)
    elif num_candidates:
        chooser = rollout if objective.config.candidates_from == "student" else models["teacher"]
        candidate_ids = chooser.topk(num_candidates).indices
    target_ids = torch.multinomial(rollout.exp(), 1, generator=generator)[:, 0] if n else torch.zeros(0).long()
    student_chose = objective.config.candidates_from == "student"
    lengths = LENGTHS if n == TOKENS else [n] if n else []
    return make_tokens(target_ids, models, rollout, candidate_ids, student_chose, lengths, **columns)


def random_case(preset: str, dtype: torch.dtype = torch.float64) -> tuple[Objective, Tensor, CompletionTokens, Any]:
    """Return an objective, a student, tokens that an older student wrote, and the models' logits."""
    objective = small(preset)
    models = {name: random_logprobs(TOKENS, VOCABULARY, seed=seed, dtype=dtype) for seed, name in enumerate(MODELS)}
    logits = models["teacher"] + random_logprobs(TOKENS, VOCABULARY, seed=5, scale=0.5, dtype=dtype)
    rollout = logits.log_softmax(-1) + random_logprobs(TOKENS, VOCABULARY, seed=6, scale=0.1, dtype=dtype)
    tokens = tokens_of(
        objective,
        models,
        rollout.log_softmax(-1),
        task_advantage=torch.linspace(-1, 1, TOKENS, dtype=dtype),
        uniform=torch.linspace(0, 0.99, TOKENS, dtype=dtype),
    )
    return objective, logits, tokens, models


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-6)])
def test_loss_and_gradient_are_zero_where_student_and_all_models_agree(
    preset: str, dtype: torch.dtype, tolerance: float
) -> None:
    objective = small(preset)
    same = random_logprobs(TOKENS, VOCABULARY, seed=0, dtype=dtype)
    models = dict.fromkeys(MODELS, same)
    results = evaluate(objective, same + 3, tokens_of(objective, models), models)
    assert results.losses.abs().max() < tolerance
    assert gradient_of(results).abs().max() < tolerance


@pytest.mark.parametrize("preset", PRESETS)
def test_the_objective_moves_a_student_that_differs(preset: str) -> None:
    results = evaluate(*random_case(preset))
    assert gradient_of(results).norm() > 1e-3
    assert results.losses.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gradient_leaves_the_sum_of_the_logits_alone(preset: str) -> None:
    """A constant added to all logits changes no probability."""
    assert gradient_of(evaluate(*random_case(preset))).sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("preset", DIVERGENCE_PRESETS)
def test_the_gradient_of_a_divergence_is_the_slope_of_its_value(preset: str) -> None:
    objective, logits, tokens, models = random_case(preset)
    gradient = gradient_of(evaluate(objective, logits, tokens, models))
    direction, step = random_logprobs(TOKENS, VOCABULARY, seed=9), 1e-6
    up, down = (evaluate(objective, logits + sign * step * direction, tokens, models).losses for sign in (1, -1))
    slope = (up - down) / (2 * step)
    torch.testing.assert_close(slope, (gradient * direction).sum(-1), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 5])
def test_chunks_of_any_size_give_the_same(preset: str, size: int) -> None:
    objective, logits, tokens, models = random_case(preset)
    whole = evaluate(objective, logits, tokens, models)
    plan = objective.plan(tokens, first_pass(logits, tokens))
    for start in range(0, TOKENS, size):
        chosen = torch.arange(start, min(start + size, TOKENS)).flip(0)
        of_full = {model: values[chosen] for model, values in models.items()}
        part = objective.evaluate(logits[chosen], tokens[chosen], plan[chosen], of_full, with_gradient=True)
        torch.testing.assert_close(part.losses, whole.losses[chosen], atol=1e-12, rtol=0)
        torch.testing.assert_close(gradient_of(part), gradient_of(whole)[chosen], atol=1e-12, rtol=0)
        torch.testing.assert_close(part.student.entropy, whole.student.entropy[chosen], atol=1e-12, rtol=0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_trajectory_alone_gives_what_it_gives_in_company(preset: str) -> None:
    """verl 7225 and 7200: the size of a micro-batch must not change the loss.

    Plans are equal to the bit. Losses may differ in the last one: a vectorised exp treats the end of a block otherwise.
    """
    objective, logits, tokens, models = random_case(preset)
    rows = slice(0, LENGTHS[0])
    facts, facts_alone = first_pass(logits, tokens), first_pass(logits[rows], tokens[rows])
    plan, plan_alone = objective.plan(tokens, facts)[rows], objective.plan(tokens[rows], facts_alone)
    assert torch.equal(plan.weights, plan_alone.weights)
    for name, later in plan.later_advantages.items():
        assert torch.equal(later, plan_alone.later_advantages[name])
    whole = evaluate(objective, logits, tokens, models)
    alone = evaluate(objective, logits[rows], tokens[rows], {model: values[rows] for model, values in models.items()})
    torch.testing.assert_close(alone.losses, whole.losses[rows], atol=1e-14, rtol=1e-14)
    torch.testing.assert_close(gradient_of(alone), gradient_of(whole)[rows], atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_completion_tokens_give_a_gradient_without_rows(preset: str) -> None:
    objective = small(preset)
    models = dict.fromkeys(MODELS, torch.empty(0, VOCABULARY))
    results = evaluate(objective, torch.empty(0, VOCABULARY), tokens_of(objective, models), models)
    assert results.losses.tolist() == []
    assert gradient_of(results).shape == (0, VOCABULARY)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("floor", [-50.0, -math.inf])
def test_impossible_tokens_give_finite_losses_and_gradients(preset: str, floor: float) -> None:
    """verl, test_special_megatron_kl_loss_tp.py: very low logits; TRL: ragged rows filled with -inf."""
    objective, logits, tokens, models = random_case(preset, torch.float32)
    logits[:, ::3] = floor
    for values in models.values():
        values[:, 1::3] = floor
    logits[0, tokens.target_ids[0]] = floor
    lowered = {
        name: {model: values.clone() for model, values in getattr(tokens, name).items()}
        for name in ("logprobs", "candidate_logprobs")
    }
    lowered["logprobs"]["teacher"][:2] = floor
    lowered["candidate_logprobs"]["teacher"][:, :2] = floor
    results = evaluate(objective, logits, replace(tokens, **lowered), models)
    assert results.losses.isfinite().all()
    assert gradient_of(results).isfinite().all()
    assert results.student.entropy.isfinite().all()


@pytest.mark.parametrize("preset", ["tail-topk", "generalized-topk", "gkd", "exact-reverse-kl", "thinking-machines"])
def test_bfloat16_logits_are_read_in_float32_and_give_nearly_the_same(preset: str) -> None:
    """A logit of up to 1 is rounded by up to 1/512; verl holds bf16 to 5e-3."""
    objective, logits, tokens, models = random_case(preset, torch.float32)
    logits = logits / logits.abs().max()
    models = {model: values / values.abs().max() for model, values in models.items()}
    rounded = {model: values.bfloat16() for model, values in models.items()}
    low, high = evaluate(objective, logits.bfloat16(), tokens, rounded), evaluate(objective, logits, tokens, models)
    assert gradient_of(low).dtype == torch.float32
    torch.testing.assert_close(low.losses, high.losses, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(gradient_of(low), gradient_of(high), atol=5e-3, rtol=5e-3)
    again = evaluate(objective, logits.bfloat16().float(), tokens, {m: values.float() for m, values in rounded.items()})
    assert torch.equal(gradient_of(low), gradient_of(again))


def test_what_the_student_says_is_reported() -> None:
    objective, logits, tokens, models = random_case("tail-topk")
    results = evaluate(objective, logits, tokens, models)
    logprobs = logits.log_softmax(-1)
    torch.testing.assert_close(results.student.logprobs, written(logprobs, tokens.target_ids))
    torch.testing.assert_close(results.student.entropy, -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(results.candidate_mass, logprobs.gather(-1, tokens.candidate_ids).exp().sum(-1))
    reported = (results.losses, results.student.logprobs, results.student.entropy, results.candidate_mass)
    assert not any(values.requires_grad for values in reported)


def test_candidates_drawn_twice_count_once_in_the_mass() -> None:
    objective = make_objective("async-opd", support_size=4)
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    tokens = make_tokens(
        torch.tensor([0]), {"teacher": logprobs}, candidate_ids=torch.tensor([[1, 2, 1]]), student_chose=True
    )
    assert evaluate(objective, logprobs, tokens).candidate_mass.item() == pytest.approx(0.5)


def test_the_gradient_takes_the_memory_of_the_logits_and_is_absent_if_not_asked_for() -> None:
    for preset in ("tail-topk", "gkd"):
        objective, logits, tokens, models = random_case(preset)
        plan = objective.plan(tokens, None)
        without = objective.evaluate(logits.clone(), tokens, plan, {m: v.clone() for m, v in models.items()}, False)
        results = objective.evaluate(logits, tokens, plan, {m: v.clone() for m, v in models.items()}, True)
        assert gradient_of(results).data_ptr() == logits.data_ptr()
        assert without.logits_gradient is None
        assert torch.equal(without.losses, results.losses)


# Where and how much


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
    student, tokens = one_token(teacher_entropy=torch.tensor([0.75]))
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


def test_token_weights_multiply_every_term() -> None:
    objective, logits, tokens, models = random_case("opd-grpo")
    plain = evaluate(objective, logits, tokens, models)
    weighted = make_objective(
        "opd-grpo", token_weights={"first_tokens": 3, "first_fraction": 0.5, "position_importance": 1.0}
    )
    results = evaluate(weighted, logits, tokens, models)
    size = (tokens.logprobs["teacher"] - plain.student.logprobs).abs()[: LENGTHS[0]]
    importance = 2 - (size.cumsum(0) - size) / size.sum()
    expected = plain.losses[: LENGTHS[0]] * importance * torch.tensor([1, 1, 1, 0, 0, 0, 0])
    torch.testing.assert_close(results.losses[: LENGTHS[0]], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient_of(results)[1], gradient_of(plain)[1] * importance[1], atol=1e-6, rtol=0)


def test_entropy_weights_use_the_models_that_are_asked_for() -> None:
    objective, logits, tokens, models = random_case("thinking-machines")
    plain = evaluate(objective, logits, tokens, models)
    found = {}
    for which in ("teacher", "student", "both"):
        weighted = make_objective("thinking-machines", token_weights={"entropy": which})
        assert weighted.needs_first_pass == (which != "teacher")
        found[which] = evaluate(weighted, logits, tokens, models).losses / plain.losses
    sure, unsure = (entropy / entropy[:7].max() for entropy in (tokens.teacher_entropy[:7], plain.student.entropy[:7]))
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
    assert objective.needs_first_pass
    assert results.losses[7] == 0
    assert gradient_of(results)[7].abs().max() == 0
    assert (results.losses[:7] != 0).all()
    assert (results.losses[8:] != 0).all()


def test_what_needs_whole_trajectories_says_so_and_refuses_to_go_without() -> None:
    for preset in PRESETS:
        assert small(preset).needs_first_pass == (preset in ("minillm", "iw-opd"))
    for student in ("rollout", "none"):
        term = {"loss": "policy_gradient", "discount": 0.5, "student": student}
        assert not make_objective(support="sampled", terms={"main": term}).needs_first_pass
    objective, _, tokens, _ = random_case("minillm")
    with pytest.raises(ValueError, match="pass first_pass"):
        objective.plan(tokens, None)


def test_later_advantages_are_those_of_the_term_s_own_divisor() -> None:
    _, logits, tokens, _ = random_case("thinking-machines")
    term = {"loss": "policy_gradient", "discount": 1.0, "importance": {"kind": "none"}, "student": "none"}
    results = evaluate(make_objective(support="sampled", terms={"main": term}), logits, tokens)
    log_target = tokens.logprobs["teacher"][:7]
    torch.testing.assert_close(results.losses[:7], -log_target.flip(0).cumsum(0).flip(0))


# Supports


def test_candidates_outside_the_student_s_most_likely_do_not_count_in_an_intersection() -> None:
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    teacher = torch.tensor([[0.1, 0.5, 0.3, 0.1]], dtype=torch.float64).log()
    tokens = make_tokens(torch.tensor([0]), {"teacher": teacher}, candidate_ids=torch.tensor([[1, 2]]))
    for truncation, expected in [
        ("renormalized", 0.0),  # token 1 alone
        ("generalized", 0.3 * math.log(0.3 / 0.5) - 0.3 + 0.5),
        ("tail", 0.3 * math.log(0.3 / 0.5) + 0.7 * math.log(0.7 / 0.5)),
    ]:
        term = GENERALIZED_KL | {"truncation": truncation}
        objective = make_objective(support="intersection", support_size=2, terms={"main": term})
        assert evaluate(objective, student, tokens).losses.item() == pytest.approx(expected)


@pytest.mark.parametrize("preset", ["gkd", "exact-reverse-kl", "exact-forward-kl", "distillm", "beta-opsd"])
@pytest.mark.parametrize(("student_extra", "models_extra"), [(3, 0), (0, 3), (2, 5)])
def test_a_padded_vocabulary_is_compared_on_the_tokens_that_all_models_have(
    preset: str, student_extra: int, models_extra: int
) -> None:
    objective, logits, tokens, models = random_case(preset)
    expected = evaluate(objective, logits, tokens, models)
    logits = torch.cat([logits, random_logprobs(TOKENS, student_extra, seed=11)], -1)
    models = {
        model: torch.cat([values, random_logprobs(TOKENS, models_extra, seed=12)], -1)
        for model, values in models.items()
    }
    width = VOCABULARY + min(student_extra, models_extra)
    if width > VOCABULARY:  # some padding is shared
        shared = {model: values[:, :width] for model, values in models.items()}
        expected = evaluate(objective, logits[:, :width], tokens, shared)
    results = evaluate(objective, logits, tokens, models)
    torch.testing.assert_close(results.losses, expected.losses, atol=1e-10, rtol=0)
    torch.testing.assert_close(gradient_of(results)[:, :width], gradient_of(expected), atol=1e-10, rtol=0)
    assert gradient_of(results)[:, width:].abs().sum() == 0
    torch.testing.assert_close(results.student.logprobs, written(logits.log_softmax(-1), tokens.target_ids))


def test_written_tokens_keep_the_whole_vocabulary_beside_a_divergence_on_the_shared_one() -> None:
    terms = {"exact": {"loss": "divergence"}, "drawn": {"loss": "policy_gradient", "baseline": "kl"}}
    both, exact, drawn = (
        make_objective(support="full", terms={name: terms[name] for name in names})
        for names in (["exact", "drawn"], ["exact"], ["drawn"])
    )
    _, logits, tokens, models = random_case("gkd")
    logits = torch.cat([logits, random_logprobs(TOKENS, 3, seed=11)], -1)
    found = [evaluate(objective, logits, tokens, models) for objective in (both, exact, drawn)]
    torch.testing.assert_close(found[0].losses, found[1].losses + found[2].losses)
    torch.testing.assert_close(gradient_of(found[0]), gradient_of(found[1]) + gradient_of(found[2]))
    # Of the drawn term alone: advantage (one-hot - p), p over all tokens.
    student = logits.log_softmax(-1)
    shared = student[:, :VOCABULARY].log_softmax(-1)
    kl = (shared.exp() * (shared - models["teacher"])).sum(-1)
    mine = written(student, tokens.target_ids)
    advantage = (tokens.logprobs["teacher"] - mine + kl) * (mine - tokens.rollout_logprobs).exp()
    one_hot = torch.nn.functional.one_hot(tokens.target_ids, VOCABULARY + 3)
    torch.testing.assert_close(gradient_of(found[2]), -advantage[:, None] * (one_hot - student.exp()))


def test_a_large_vocabulary_is_worked_through_in_blocks_of_rows() -> None:
    vocabulary = CPU_BLOCK_ELEMENTS // 2 - 1  # two rows a block: 2, 2 and 1
    logits, teacher = random_logprobs(5, vocabulary, seed=0), random_logprobs(5, vocabulary, seed=1)
    tokens = make_tokens(torch.arange(5), {"teacher": teacher})
    leaf = logits.clone().requires_grad_()
    expected = jsd(leaf.log_softmax(-1), teacher, 0.5)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    results = evaluate(make_objective("gkd"), logits, tokens, {"teacher": teacher})
    torch.testing.assert_close(results.losses, expected)
    torch.testing.assert_close(gradient_of(results), gradient, atol=1e-12, rtol=0)
    torch.testing.assert_close(results.student.logprobs, written(logits, torch.arange(5)))


def test_several_divergences_over_the_vocabulary_add_up() -> None:
    terms: dict[str, Any] = {
        "main": {"loss": "divergence", "weight": 0.2},
        "cover": {"loss": "divergence", "divergence": "forward_kl", "weight": 0.8, "when": "log_ratio_positive"},
        "anchor": {"loss": "divergence", "divergence": "jsd", "target": {"initial_student": 1.0}},
    }
    _, logits, tokens, models = random_case("gkd")
    whole = evaluate(make_objective(support="full", terms=terms), logits, tokens, models)
    parts = [
        evaluate(make_objective(support="full", terms={name: term}), logits, tokens, models)
        for name, term in terms.items()
    ]
    torch.testing.assert_close(whole.losses, torch.stack([part.losses for part in parts]).sum(0))
    torch.testing.assert_close(gradient_of(whole), torch.stack([gradient_of(part) for part in parts]).sum(0))


def test_a_candidate_that_the_student_s_vocabulary_lacks_takes_no_part() -> None:
    _, logits, tokens, models = random_case("tail-topk")
    objective = small("tail-topk")
    ids = tokens.candidate_ids.clone()
    ids[:, 2] = VOCABULARY + 4  # a padding token of the teacher
    padded = evaluate(objective, logits, replace(tokens, candidate_ids=ids), models)
    kept = [0, 1, 3, 4, 5]
    without = replace(
        tokens,
        candidate_ids=tokens.candidate_ids[:, kept],
        candidate_logprobs={model: values[:, kept] for model, values in tokens.candidate_logprobs.items()},
    )
    expected = evaluate(objective, logits, without, models)
    torch.testing.assert_close(padded.losses, expected.losses)
    torch.testing.assert_close(gradient_of(padded), gradient_of(expected))


def test_no_candidates_are_no_divergence() -> None:
    for truncation in ("generalized", "renormalized", "tail"):
        _, logits, tokens, _ = random_case("tail-topk")
        none = replace(
            tokens,
            candidate_ids=tokens.candidate_ids[:, :0],
            candidate_logprobs={model: values[:, :0] for model, values in tokens.candidate_logprobs.items()},
        )
        objective = make_objective(support="topk", terms={"main": GENERALIZED_KL | {"truncation": truncation}})
        results = evaluate(objective, logits, none)
        assert results.losses.abs().max() == 0
        assert gradient_of(results).abs().max() == 0


def test_tokens_and_plans_are_chosen_alike() -> None:
    objective, logits, tokens, _ = random_case("minillm")
    plan = objective.plan(tokens, first_pass(logits, tokens))
    chosen = torch.tensor([5, 0, 9])
    assert torch.equal(plan[chosen].later_advantages["main"], plan.later_advantages["main"][chosen])
    assert torch.equal(tokens[chosen].logprobs["teacher"], tokens.logprobs["teacher"][chosen])
    assert len(plan[2:5]) == len(tokens[2:5]) == 3
    moved = tokens.to(torch.device("cpu"))
    assert all(type(getattr(moved, field.name)) is type(getattr(tokens, field.name)) for field in fields(tokens))


def test_a_plan_made_by_hand_is_what_evaluate_follows() -> None:
    objective, logits, tokens, _ = random_case("thinking-machines")
    weights = torch.linspace(0, 2, TOKENS)
    plan = TokenPlan(weights, {}, {})
    doubled = objective.evaluate(logits.clone(), tokens, plan, {}, with_gradient=True)
    torch.testing.assert_close(doubled.losses, evaluate(objective, logits, tokens).losses * weights)
    assert isinstance(doubled.student, StudentFacts)
