"""Objectives over vocabularies that are padded, large, or larger for one model than for another."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from learner.loss.softmax import CPU_BLOCK_ELEMENTS
from tests.learner.loss.builders import (
    TOKENS,
    VOCABULARY,
    evaluate,
    gradient_of,
    jsd,
    make_objective,
    make_tokens,
    random_case,
    random_logprobs,
    small,
    with_scores,
    written,
)

KL = {"loss": "divergence", "divergence": "reverse_kl"}


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
    torch.testing.assert_close(results.logprobs, written(logits.log_softmax(-1), tokens.target_ids))


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
    torch.testing.assert_close(results.logprobs, written(logits, torch.arange(5)))


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
    without = with_scores(
        replace(tokens, candidate_ids=tokens.candidate_ids[:, kept]),
        candidate_logprobs={model: values[:, kept] for model, values in tokens.candidate_logprobs.items()},
    )
    expected = evaluate(objective, logits, without, models)
    torch.testing.assert_close(padded.losses, expected.losses)
    torch.testing.assert_close(gradient_of(padded), gradient_of(expected))


def test_no_candidates_are_no_divergence() -> None:
    for truncation in ("generalized", "renormalized", "tail"):
        _, logits, tokens, _ = random_case("tail-topk")
        none = with_scores(
            replace(tokens, candidate_ids=tokens.candidate_ids[:, :0]),
            candidate_logprobs={model: values[:, :0] for model, values in tokens.candidate_logprobs.items()},
        )
        term = {**KL, "truncation": truncation, "residual": False}
        results = evaluate(make_objective(support="topk", terms={"main": term}), logits, none)
        assert results.losses.abs().max() == 0
        assert gradient_of(results).abs().max() == 0
