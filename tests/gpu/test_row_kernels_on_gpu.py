"""The kernels over rows of logits say on a card what plain torch says there in float64, over a real vocabulary."""

from typing import Any

import msgspec
import pytest
import torch

from cluster.config.objective import ObjectiveConfig
from learner.loss import divergences
from learner.loss.kernels.choice import choose_kernels
from learner.loss.objective import Objective
from tests.learner.loss.builders import make_tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

TOKENS, VOCABULARY, SHARED = 64, 151_936, 151_669
TOLERANCE = 1e-4  # of the norm
CARD = torch.device("cuda")
DIVERGENCES = [(name, parameter) for name in sorted(divergences.DIVERGENCES) for parameter in (0.1, 1.0)]


def logits_of(width: int, seed: int) -> torch.Tensor:
    random = torch.Generator(CARD).manual_seed(seed)
    return torch.randn(TOKENS, width, generator=random, device=CARD) * 3


def check(table: dict[str, Any], width: int) -> None:
    """Evaluate random logits with and without kernels; the target has so many tokens."""
    config = msgspec.convert(table, ObjectiveConfig)
    kernels = choose_kernels(CARD, config.needs.hidden)
    assert kernels is not None, "the log says why"
    target = logits_of(width, seed=1)
    logits = logits_of(VOCABULARY, seed=0)
    logits[:, :width] += target
    ids = torch.arange(0, 1000 * TOKENS, 1000, device=CARD)
    said = {"teacher": target.log_softmax(-1)}
    rollout = logits.log_softmax(-1)
    tokens = make_tokens(ids.cpu(), {"teacher": said["teacher"].cpu()}, rollout.cpu()).to(CARD)
    found = []
    for objective, dtype in ((Objective(config, kernels), torch.float32), (Objective(config), torch.float64)):
        plan, models = objective.plan(tokens, None), {"teacher": target.to(dtype, copy=True)}
        results = objective.evaluate(logits.to(dtype, copy=True), tokens, plan, models, with_gradient=True)
        assert results.logits_gradient is not None
        found.append([results.losses, results.logprobs, results.entropy, results.logits_gradient])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= TOLERANCE * other.norm() + 1e-6


@pytest.mark.parametrize("width", [VOCABULARY, SHARED])
@pytest.mark.parametrize(("name", "parameter"), DIVERGENCES)
def test_divergences_and_their_gradients_are_those_of_plain_torch(name: str, parameter: float, width: int) -> None:
    term = {"loss": "divergence", "divergence": name, "beta": parameter, "skew": parameter}
    check({"support": "full", "terms": {"main": term}}, width)


def test_softmaxes_and_their_gradients_are_those_of_plain_torch() -> None:
    check({"support": "sampled", "terms": {"main": {"loss": "policy_gradient"}}}, VOCABULARY)
