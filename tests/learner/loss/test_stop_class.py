"""A class of stop ids is one token: losses and gradients are those of a vocabulary that has a single one."""

import pytest
import torch

from cluster.config.presets import PRESETS
from cluster.models.stop_class import merge_logits, split_gradient
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from tests.learner.loss.builders import VOCABULARY, evaluate, gradient_of, make_objective, random_case, small


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
