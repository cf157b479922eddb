"""What terms beyond the presets expect, by exact enumeration in float64 of every token that may be written.

One prefix; each expected gradient is written down as the formula of its source, and differentiated by autograd.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.learner.loss.builders import evaluate, gradient_of, make_objective, make_tokens, random_logprobs

VOCABULARY, SUPPORT_SIZE = 11, 4
STUDENT, TEACHER, BASE = (random_logprobs(1, VOCABULARY, seed=seed, scale=1.5) for seed in (0, 1, 2))
OTHER = random_logprobs(1, VOCABULARY, seed=3)
STALE = (STUDENT + random_logprobs(1, VOCABULARY, seed=4, scale=0.6)).log_softmax(-1)
ROLLOUTS = {"on-policy": STUDENT, "stale": STALE}
OF_ANY_AGE = pytest.mark.parametrize("rollout", ROLLOUTS.values(), ids=ROLLOUTS)


def expected_gradient(
    terms: dict[str, Any],
    rollout: Tensor = STUDENT,
    support: str = "sampled",
    student: Tensor = STUDENT,
    **columns: Any,
) -> Tensor:
    """Return the mean gradient by the logits over what the rollout worker may write, [vocabulary]."""
    sized = {} if support in ("sampled", "full") else {"support_size": SUPPORT_SIZE}
    objective = make_objective(support=support, terms=terms, **sized)
    models = {"teacher": TEACHER.expand(VOCABULARY, -1), "base": BASE.expand(VOCABULARY, -1)}
    chooser = rollout if objective.needs.candidates_from == "student" else TEACHER
    candidates = chooser.topk(objective.needs.num_candidates).indices.expand(VOCABULARY, -1)
    tokens = make_tokens(
        torch.arange(VOCABULARY),
        models,
        rollout.expand(VOCABULARY, -1),
        candidates,
        student_chose=objective.needs.candidates_from == "student",
        lengths=[1] * VOCABULARY,
        **columns,
    )
    by_token = gradient_of(evaluate(objective, student.expand(VOCABULARY, -1), tokens, models))
    return rollout.exp()[0] @ by_token


def slope(loss: Callable[[Tensor], Tensor], student: Tensor = STUDENT) -> Tensor:
    """Return the gradient by the logits of a function of the student's log-probabilities, [vocabulary]."""
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf.log_softmax(-1)).sum(), leaf)[0][0]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("support", ["sampled", "full", "topk"])
def test_cross_entropy_pulls_the_student_to_whatever_wrote(support: str) -> None:
    found = expected_gradient({"main": {"loss": "cross_entropy"}}, OTHER, support)
    assert_same(found, slope(lambda p: (OTHER.exp() * (OTHER - p)).sum(-1)))


def test_a_gate_takes_the_weight_from_tokens_that_the_student_would_never_write() -> None:
    """Sigmoid(kappa (log p - gamma)), without a gradient of its own."""
    gate = {"kappa": 3.0, "gamma": -2.0}
    weight = 1 / (1 + (-3 * (STUDENT + 2)).exp())
    found = expected_gradient({"main": {"loss": "cross_entropy", "gate": gate}}, OTHER)
    assert_same(found, slope(lambda p: -(OTHER.exp() * weight * p).sum(-1)))


def test_cross_entropy_on_the_student_s_own_tokens_says_nothing_unless_some_are_chosen() -> None:
    assert expected_gradient({"main": {"loss": "cross_entropy"}}).norm() < 1e-15
    chosen = {"loss": "cross_entropy", "when": "log_ratio_positive"}
    better = (TEACHER > STUDENT).double()
    assert_same(expected_gradient({"main": chosen}), slope(lambda p: -(STUDENT.exp() * better * p).sum(-1)))
