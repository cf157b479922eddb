"""Whole objectives, from the configuration to the gradient by the logits."""

import math
from dataclasses import fields, replace

import pytest
import torch

from cluster.config.presets import PRESETS
from learner.loss.tokens import Evaluation, TokenPlan
from tests.learner.loss.builders import (
    LENGTHS,
    MODELS,
    TOKENS,
    VOCABULARY,
    evaluate,
    first_pass,
    gradient_of,
    make_objective,
    make_tokens,
    random_case,
    random_logprobs,
    small,
    tokens_of,
    with_scores,
    written,
)

DIVERGENCE_PRESETS = [
    name
    for name, table in PRESETS.items()
    if all(term["loss"] == "divergence" and "when" not in term for term in table["terms"].values())
    and name not in ("tail-topk", "res-opd")  # of a sampled token's advantage, the value has a slope too
]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "temperature"),
    [(torch.float64, 1e-9, 1.0), (torch.float32, 2e-6, 1.0), (torch.float64, 1e-9, 0.7), (torch.float64, 1e-9, 1.3)],
)
def test_loss_and_gradient_are_zero_where_student_and_all_models_agree(
    preset: str, dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    objective = small(preset, temperature)
    same = random_logprobs(TOKENS, VOCABULARY, seed=0, dtype=dtype)
    models, sampler = dict.fromkeys(MODELS, same), (same / temperature).log_softmax(-1)
    results = evaluate(objective, same + 3, tokens_of(objective, models, sampler), models)
    assert results.losses.abs().max() < tolerance
    assert gradient_of(results).abs().max() < tolerance


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in ("oprd", "last-opd")])  # states, at first
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
        torch.testing.assert_close(part.entropy, whole.entropy[chosen], atol=1e-12, rtol=0)


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
    for name, later in plan.added_advantages.items():
        assert torch.equal(later, plan_alone.added_advantages[name])
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
    results = evaluate(objective, logits, with_scores(tokens, **lowered), models)
    assert results.losses.isfinite().all()
    assert gradient_of(results).isfinite().all()
    assert results.entropy.isfinite().all()


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
    torch.testing.assert_close(results.logprobs, written(logprobs, tokens.target_ids))
    torch.testing.assert_close(results.entropy, -(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(results.candidate_mass, logprobs.gather(-1, tokens.candidate_ids).exp().sum(-1))
    reported = (results.losses, results.logprobs, results.entropy, results.candidate_mass)
    assert not any(values.requires_grad for values in reported)


def test_candidates_drawn_twice_count_once_in_the_mass() -> None:
    objective = make_objective("async-opd", support_size=4)
    logprobs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    tokens = make_tokens(
        torch.tensor([0]), {"teacher": logprobs}, candidate_ids=torch.tensor([[1, 2, 1]]), student_chose=True
    )
    assert evaluate(objective, logprobs, tokens).candidate_mass.item() == pytest.approx(0.5)


def test_a_candidate_that_only_a_padded_teacher_has_counts_nothing_in_the_mass() -> None:
    objective = make_objective("tail-topk", support_size=2)
    student = torch.tensor([[0.2, 0.3, 0.5]]).log()
    tokens = make_tokens(torch.tensor([0]), {"teacher": student}, candidate_ids=torch.tensor([[1, 2]]))
    padded = replace(tokens, candidate_ids=torch.tensor([[1, 7]]))
    assert evaluate(objective, student, padded).candidate_mass.item() == pytest.approx(0.3)


def test_the_gradient_takes_the_memory_of_the_logits_and_is_absent_if_not_asked_for() -> None:
    for preset in ("tail-topk", "gkd"):
        objective, logits, tokens, models = random_case(preset)
        plan = objective.plan(tokens, None)
        without = objective.evaluate(logits.clone(), tokens, plan, {m: v.clone() for m, v in models.items()}, False)
        results = objective.evaluate(logits, tokens, plan, {m: v.clone() for m, v in models.items()}, True)
        assert gradient_of(results).data_ptr() == logits.data_ptr()
        assert without.logits_gradient is None
        assert torch.equal(without.losses, results.losses)


def test_tokens_and_plans_are_chosen_alike() -> None:
    objective, logits, tokens, _ = random_case("minillm")
    plan = objective.plan(tokens, first_pass(logits, tokens))
    chosen = torch.tensor([5, 0, 9])
    assert torch.equal(plan[chosen].added_advantages["main"], plan.added_advantages["main"][chosen])
    assert torch.equal(tokens[chosen].logprobs["teacher"], tokens.logprobs["teacher"][chosen])
    assert len(plan[2:5]) == len(tokens[2:5]) == 3
    moved = tokens.to(torch.device("cpu"))
    assert all(type(getattr(moved, field.name)) is type(getattr(tokens, field.name)) for field in fields(tokens))


def test_a_plan_made_by_hand_is_what_evaluate_follows() -> None:
    objective, logits, tokens, _ = random_case("thinking-machines")
    weights = torch.linspace(0, 2, TOKENS)
    plan = TokenPlan(weights, {}, {}, torch.zeros(TOKENS))
    doubled = objective.evaluate(logits.clone(), tokens, plan, {}, with_gradient=True)
    torch.testing.assert_close(doubled.losses, evaluate(objective, logits, tokens).losses * weights)
    assert isinstance(doubled, Evaluation)
