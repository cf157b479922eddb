"""The alpha-divergence of examples/extend: its value by hand, its gradient, and steps that learn by it."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import ConfigError
from cluster.contracts.metrics import report
from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.batching.plan import plan_step
from learner.engines.torch import ReferenceEngine
from learner.loss.objective import Objective
from learner.model.student import load_student
from tests.learner.conftest import write_model
from tests.learner.loss.builders import divergence, evaluate, gradient_of, make_objective, make_tokens, random_logprobs
from tests.learner.support import ROUTE, WholeStep, completion_tokens, make_scored, random_heads, train_step

ALPHA = "examples.extend.divergence:ALPHA"
P, Q = (torch.tensor([values], dtype=torch.float64).log() for values in ((0.25, 0.75), (0.5, 0.5)))
BY_HAND = 4 * (1 - math.sqrt(1 / 8) - math.sqrt(3 / 8))  # alpha 1/2: 4 (1 - sum of sqrt(p q))


def objective_with(support: str, alpha: float = 0.5, **fields: Any) -> Objective:
    term = {"loss": "divergence", "divergence": ALPHA, "parameter": alpha, **fields}
    return make_objective(support=support, support_size=2, terms={"main": term})


def evaluated(objective: Objective, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses and gradient by the logits; the candidates are the first two tokens."""
    ids = torch.tensor([[0, 1]]).expand(len(student), -1)
    candidates = None if objective.needs.hidden else ids
    tokens = make_tokens(ids[:, 0], {"teacher": teacher}, candidate_ids=candidates)
    results = evaluate(objective, student, tokens, {"teacher": teacher})
    return results.losses, gradient_of(results)


@pytest.mark.parametrize("support", ["full", "topk"])
def test_the_value_is_the_one_derived_by_hand(support: str) -> None:
    losses, _ = evaluated(objective_with(support, truncation="generalized"), P, Q)
    assert losses.item() == pytest.approx(BY_HAND)


@pytest.mark.parametrize("support", ["full", "topk"])
@pytest.mark.parametrize("truncation", ["tail", "generalized", "renormalized"])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_value_and_gradient_are_zero_where_student_and_teacher_agree(
    support: str, truncation: str, alpha: float
) -> None:
    same = random_logprobs(5, 9, seed=0)
    losses, gradient = evaluated(objective_with(support, alpha, truncation=truncation), same, same)
    assert losses.abs().max() < 1e-12
    assert gradient.abs().max() < 1e-12


def test_the_gradient_is_that_of_autograd_on_the_definition() -> None:
    logits, teacher = random_logprobs(5, 9, seed=1).requires_grad_(), random_logprobs(5, 9, seed=2)
    expected = ((0.7 * logits.log_softmax(-1) + 0.3 * teacher).exp().sum(-1) - 1) / (0.3 * (0.3 - 1))
    (by_logits,) = torch.autograd.grad(expected.sum(), logits)
    losses, gradient = evaluated(objective_with("full", 0.3), logits.detach(), teacher)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, by_logits)


def test_the_ends_of_alpha_are_the_two_kullback_leibler_divergences() -> None:
    for alpha, name in ((0.0, "reverse_kl"), (1.0, "forward_kl")):
        losses, _ = evaluated(objective_with("full", alpha), P, Q)
        torch.testing.assert_close(losses, divergence(name, P, Q))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("examples.extend.divergence:BETA", "'examples.extend.divergence:BETA' as a divergence cannot be imported"),
        (
            "examples.extend.divergence:alpha_divergence",
            "is a function; expected a learner.loss.divergences.Divergence",
        ),
    ],
)
def test_what_is_no_divergence_is_refused_in_a_sentence(name: str, says: str) -> None:
    config = msgspec.convert({"terms": {"main": {"loss": "divergence", "divergence": name}}}, ObjectiveConfig)
    with pytest.raises(ConfigError, match=says):
        Objective(config)


def test_steps_of_the_learner_bring_the_student_closer_by_it(tmp_path: Path) -> None:
    config = LearnerConfig(dtype="float32", learning_rate=3e-3)
    engine = ReferenceEngine(load_student(StudentConfig(str(write_model(tmp_path, width=64))), config), config)
    term = {"loss": "divergence", "divergence": ALPHA, "parameter": 0.5}
    objective = msgspec.convert({"support": "full", "terms": {"main": term}}, ObjectiveConfig)
    heads = random_heads(objective, {ROUTE: 48})
    batch = make_scored(objective, heads=heads)
    rows = trajectories([batch])
    (grids,) = plan_step([len(row.token_ids) for row in rows], 1, 128)
    step = WholeStep(Objective(objective), completion_tokens(batch), heads)
    losses = []
    for _ in range(8):
        micro_batches = [build_micro_batch(grid, rows, seed=0) for grid in grids]
        losses.append(report(train_step(engine, micro_batches, step, 3e-3))["loss"])
    assert 0 < losses[-1] < 0.8 * losses[0]
