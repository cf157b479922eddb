"""A class of stop ids is one token: losses and gradients are those of a vocabulary that has a single one."""

import pytest
import torch

from cluster.config.presets import PRESETS
from cluster.models.stop_class import merge_logits, split_gradient
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from tests.learner.loss.builders import (
    VOCABULARY,
    evaluate,
    gradient_of,
    make_objective,
    make_tokens,
    random_case,
    small,
)


def split(logits: torch.Tensor, token_id: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a part of a token's probability to a further id; return the logits, and the shares of both."""
    shares = torch.rand(len(logits), 1, generator=torch.manual_seed(seed), dtype=logits.dtype) * 0.98 + 0.01
    shares = torch.cat([shares, 1 - shares], dim=-1)
    parts = logits[:, [token_id]] + shares.log()
    whole = torch.cat([logits, parts[:, 1:]], dim=-1)
    whole[:, token_id] = parts[:, 0]
    return whole, shares


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("preset", PRESETS)
def test_two_ids_that_end_completions_have_loss_and_gradient_of_one(preset: str, temperature: float) -> None:
    _, logits, tokens, models = random_case(preset)
    compare(small(preset, temperature), logits, tokens, models)


def test_a_difference_of_two_models_makes_no_target_of_ids_that_count_as_another() -> None:
    _, logits, tokens, models = random_case("gkd")
    term = {"loss": "divergence", "divergence": "forward_kl", "target": {"teacher": 1.0, "base": -1.0}}
    compare(make_objective(support="full", terms={"main": term}), logits, tokens, models)


def compare(
    objective: Objective, logits: torch.Tensor, tokens: CompletionTokens, models: dict[str, torch.Tensor]
) -> None:
    """Compare an objective on a vocabulary in which one token is split with the same on that which has it whole."""
    stop = int(tokens.target_ids.mode().values)
    assert (tokens.target_ids == stop).any()
    expected = evaluate(objective, logits, tokens, models)
    student, shares = split(logits, stop, seed=1)
    teachers = {model: split(values, stop, seed)[0] for seed, (model, values) in enumerate(models.items(), start=2)}
    for values in teachers.values():
        merge_logits(values, (stop, VOCABULARY))
    kept = merge_logits(student, (stop, VOCABULARY))
    torch.testing.assert_close(kept, shares, atol=1e-12, rtol=0)
    found = evaluate(objective, student, tokens, teachers)
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.entropy, expected.entropy, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.sampler_logprobs, expected.sampler_logprobs, atol=1e-10, rtol=0)
    gradient = gradient_of(found)
    split_gradient(gradient, (stop, VOCABULARY), kept)
    of_one = gradient_of(expected)
    torch.testing.assert_close(gradient[:, [stop, VOCABULARY]], of_one[:, [stop]] * shares, atol=1e-10, rtol=1e-10)
    others = [token_id for token_id in range(VOCABULARY) if token_id != stop]
    torch.testing.assert_close(gradient[:, others], of_one[:, others], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("preset", ["tail-topk", "exact-reverse-kl", "thinking-machines"])
def test_completions_grow_where_a_teacher_ends_by_another_id_and_not_where_both_are_one(preset: str) -> None:
    """Tokens are drawn alike at every position; the mean length is 1 over the probability to end."""
    ends = (0, 1)
    student = torch.tensor([[0.2, 1e-4, *[0.7999 / 6] * 6]]).double().log()
    teacher = student[:, [1, 0, *range(2, 8)]]
    lengths = {True: trained_length(preset, student, teacher, ends, True)}
    lengths[False] = trained_length(preset, student, teacher, ends, False)
    assert lengths[True] == pytest.approx(1 / 0.2001, rel=1e-6)
    assert lengths[False] > 4 * lengths[True]


def trained_length(
    preset: str, logits: torch.Tensor, teacher: torch.Tensor, ends: tuple[int, ...], is_merged: bool
) -> float:
    """Take steps along the expected gradient, over all tokens that the student may write."""
    objective, target = (
        make_objective(preset, **({"support_size": 3} if preset == "tail-topk" else {})),
        teacher.clone(),
    )
    if is_merged:
        merge_logits(target, ends)
    for _ in range(60):
        now = logits.clone()
        shares = merge_logits(now, ends) if is_merged else None
        vocabulary = now.shape[-1]
        rows, ids = now.log_softmax(-1).repeat(vocabulary, 1), torch.arange(vocabulary)
        models = {"teacher": target.repeat(vocabulary, 1)}
        candidates = target.topk(3).indices.repeat(vocabulary, 1) if objective.needs.num_candidates else None
        tokens = make_tokens(ids, models, rows, candidates, lengths=[1] * vocabulary)
        by_token = gradient_of(evaluate(objective, now.repeat(vocabulary, 1), tokens, models))
        gradient = (now.softmax(-1).T * by_token).sum(0, keepdim=True)
        if shares is not None:
            split_gradient(gradient, ends, shares)
        logits = logits - 0.5 * gradient
    return 1 / float(logits.softmax(-1)[0, list(ends)].sum())
