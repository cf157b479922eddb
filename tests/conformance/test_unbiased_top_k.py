"""What a top-k divergence leaves out comes back from sampled tokens: ResOPD (arXiv 2610.04882), TT-OPD (2609.34447).

One prefix, by exact enumeration in float64 of every token that the rollout worker may write.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.loss.objective import Objective
from tests.learner.loss.builders import (
    BUCKET_DIVERGENCES,
    evaluate,
    gradient_of,
    make_objective,
    make_tokens,
    random_logprobs,
    reverse_kl,
)

VOCABULARY, SUPPORT_SIZE = 11, 4
LOGITS = random_logprobs(1, VOCABULARY, seed=0)
TEACHER = random_logprobs(1, VOCABULARY, seed=1)
ROLLOUTS = {
    "on-policy": LOGITS,
    "stale": random_logprobs(1, VOCABULARY, seed=2, scale=0.8) + LOGITS,
    "hot": LOGITS / 1.3,
    "cold": LOGITS / 0.7,
}
SUPPORTS = ["topk", "student_topk", "intersection"]
RESIDUAL = {"main": {"loss": "divergence"}}
TT = {
    "main": {"loss": "divergence", "truncation": "generalized"},
    "outside": {"loss": "policy_gradient", "when": "outside_support"},
}
CORRECTED = pytest.mark.parametrize("terms", [RESIDUAL, TT], ids=["residual", "tt"])


def gradients_by_token(objective: Objective, rollout: Tensor, models: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Return the gradient by the logits for each token that the rollout worker may write, [vocabulary, vocabulary]."""
    size, every = logits.shape[-1], torch.arange(logits.shape[-1])
    chooser = rollout if objective.needs.candidates_from == "student" else models["teacher"]
    whole = {model: values.expand(size, -1) for model, values in models.items()}
    tokens = make_tokens(
        every,
        whole,
        rollout.log_softmax(-1).expand(size, -1),
        chooser.topk(objective.needs.num_candidates).indices.expand(size, -1),
        student_chose=objective.needs.candidates_from == "student",
        lengths=[1] * size,
    )
    return gradient_of(evaluate(objective, logits.expand(size, -1), tokens))


def expected_gradient(
    terms: dict[str, Any],
    support: str = "topk",
    rollout: Tensor = LOGITS,
    models: dict[str, Tensor] | None = None,
    logits: Tensor = LOGITS,
) -> Tensor:
    """Return the mean gradient by the logits, [vocabulary]."""
    objective = make_objective(support=support, support_size=SUPPORT_SIZE, terms=terms)
    by_token = gradients_by_token(objective, rollout, models or {"teacher": TEACHER}, logits)
    return rollout.softmax(-1)[0] @ by_token


def slope(divergence: Callable[[Tensor], Tensor], logits: Tensor = LOGITS) -> Tensor:
    """Return the gradient of a function of whole distributions by the logits, [vocabulary]."""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(divergence(leaf.log_softmax(-1)).sum(), leaf)[0][0]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the distance of two gradients, in the length of the expected one."""
    return float((found - expected).norm() / expected.norm())


@CORRECTED
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_the_expected_gradient_is_that_of_the_whole_reverse_kl(
    terms: dict[str, Any], support: str, rollout: str
) -> None:
    whole = slope(lambda student: reverse_kl(student, TEACHER))
    assert relative_error(expected_gradient(terms, support, ROLLOUTS[rollout]), whole) < 1e-8


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("truncation", ["tail", "generalized", "renormalized"])
def test_without_the_correction_every_truncation_is_biased(support: str, truncation: str) -> None:
    whole = slope(lambda student: reverse_kl(student, TEACHER))
    terms = {"main": {"loss": "divergence", "truncation": truncation, "residual": False}}
    assert relative_error(expected_gradient(terms, support), whole) > 0.1


@CORRECTED
@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize(
    "target",
    [{"teacher": 1.25, "base": -0.25}, {"teacher": 0.5, "base": 0.5}, {"teacher": 2.0}, {"teacher": 1.0, "base": 1.0}],
    ids=str,
)
def test_a_target_of_several_models_has_one_scale_inside_and_outside_of_the_support(
    terms: dict[str, Any], rollout: str, target: dict[str, float]
) -> None:
    models = {"teacher": TEACHER, "base": random_logprobs(1, VOCABULARY, seed=3)}
    mixed = torch.stack([share * models[model] for model, share in target.items()]).sum(0).log_softmax(-1)
    aimed = {name: {**term, "target": target} for name, term in terms.items()}
    found = expected_gradient(aimed, "topk", ROLLOUTS[rollout], models)
    assert relative_error(found, slope(lambda student: reverse_kl(student, mixed))) < 1e-8


@CORRECTED
def test_a_teacher_whose_tail_is_below_the_floor_of_the_bucket_still_pulls_all_of_the_student_s(
    terms: dict[str, Any],
) -> None:
    """The bucket takes the teacher's tail of 3e-9 for 1e-6; without the correction a third of the gradient is gone."""
    teacher = torch.cat([TEACHER[:, :SUPPORT_SIZE].log_softmax(-1), torch.full((1, 7), -21.5).double()], -1)
    teacher = teacher.log_softmax(-1)
    assert 2e-9 < teacher[:, SUPPORT_SIZE:].exp().sum() < 4e-9
    whole = slope(lambda student: reverse_kl(student, teacher))
    assert relative_error(expected_gradient(terms, models={"teacher": teacher}), whole) < 1e-8
    plain = {"main": {"loss": "divergence", "residual": False}}
    assert relative_error(expected_gradient(plain, models={"teacher": teacher}), whole) > 0.3


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_no_single_sample_is_moved_where_student_and_teacher_agree(support: str, rollout: str) -> None:
    """Exactly: not on average only."""
    models = {"teacher": LOGITS.log_softmax(-1)}
    logits = LOGITS.log_softmax(-1)
    corrected, plain = (
        make_objective(support=support, support_size=SUPPORT_SIZE, terms={"main": {**RESIDUAL["main"], **fields}})
        for fields in ({}, {"residual": False})
    )
    found, without = (
        gradients_by_token(objective, ROLLOUTS[rollout], models, logits) for objective in (corrected, plain)
    )
    assert torch.equal(found, without)
    tt = make_objective(support=support, support_size=SUPPORT_SIZE, terms=TT)
    assert gradients_by_token(tt, ROLLOUTS[rollout], models, logits).abs().max() < 1e-15


def test_the_second_moment_falls_from_the_sampled_estimator_over_tt_to_the_residual() -> None:
    """On-policy, a sum over random pairs."""
    moments = {}
    for name, support, terms in [
        ("sampled", "topk", {"main": {"loss": "policy_gradient"}}),
        ("tt", "topk", TT),
        ("residual", "topk", RESIDUAL),
    ]:
        objective = make_objective(support=support, support_size=SUPPORT_SIZE, terms=terms)
        total = 0.0
        for seed in range(30):
            teacher = random_logprobs(1, VOCABULARY, seed=100 + seed)
            logits = teacher + random_logprobs(1, VOCABULARY, seed=200 + seed, scale=0.7)
            by_token = gradients_by_token(objective, logits, {"teacher": teacher}, logits)
            total += float(logits.softmax(-1)[0] @ by_token.square().sum(-1))
        moments[name] = total
    assert moments["residual"] < 0.9 * moments["tt"] < 0.6 * moments["sampled"]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("jsd", "beta"), ("jsd", "beta=1"), ("skewed_reverse_kl", "skew"), ("skewed_forward_kl", "skew")],
)
@pytest.mark.parametrize("rollout", ROLLOUTS)
def test_other_divergences_of_bounded_slope_can_be_corrected_too(name: str, parameter: str, rollout: str) -> None:
    field, value = ("beta", 1.0) if parameter == "beta=1" else (parameter, 0.3)
    term = {"loss": "divergence", "divergence": name, field: value}
    whole = slope(lambda student: BUCKET_DIVERGENCES[name](student, TEACHER, value))
    corrected = expected_gradient({"main": {**term, "residual": True}}, rollout=ROLLOUTS[rollout])
    assert relative_error(corrected, whole) < 1e-8
    assert relative_error(expected_gradient({"main": term}), whole) > 0.05


@pytest.mark.parametrize("support", SUPPORTS)
def test_the_value_estimates_the_whole_reverse_kl(support: str) -> None:
    objective = make_objective(support=support, support_size=SUPPORT_SIZE, terms=RESIDUAL)
    every, rollout = torch.arange(VOCABULARY), ROLLOUTS["stale"].log_softmax(-1)
    chooser = rollout if support == "student_topk" else TEACHER
    tokens = make_tokens(
        every,
        {"teacher": TEACHER.expand(VOCABULARY, -1)},
        rollout.expand(VOCABULARY, -1),
        chooser.topk(SUPPORT_SIZE).indices.expand(VOCABULARY, -1),
        student_chose=support == "student_topk",
    )
    losses = evaluate(objective, LOGITS.expand(VOCABULARY, -1), tokens).losses
    assert (rollout.exp()[0] @ losses).item() == pytest.approx(reverse_kl(LOGITS, TEACHER).item(), rel=1e-10)


def test_without_candidates_the_residual_is_the_sampled_estimator() -> None:
    """All of the teacher's choices lie outside the student's vocabulary."""
    tokens = make_tokens(
        torch.arange(VOCABULARY),
        {"teacher": TEACHER.expand(VOCABULARY, -1)},
        ROLLOUTS["stale"].log_softmax(-1).expand(VOCABULARY, -1),
        lengths=[1] * VOCABULARY,
    )
    drawn, residual = (
        evaluate(make_objective(support=support, terms={"main": {"loss": loss}}), LOGITS.expand(VOCABULARY, -1), tokens)
        for support, loss in (("sampled", "policy_gradient"), ("topk", "divergence"))
    )
    torch.testing.assert_close(residual.losses, drawn.losses)
    torch.testing.assert_close(gradient_of(residual), gradient_of(drawn))
