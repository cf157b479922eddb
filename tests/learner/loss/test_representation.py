"""Gradients of representation terms are those of closed form, and teacher and bank have none."""

import math
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.terms import RepresentationTerm
from cluster.models.hidden_layers import ProjectionBank
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens
from tests.learner.loss.builders import make_tokens, random_logprobs

TOKENS, WIDTH, TEACHER_WIDTH, RANK, DEPTH = 5, 8, 12, 3, 4
LAYERS = (2, 4)


class Aligned(NamedTuple):
    losses: Tensor
    errors: Tensor
    gradients: dict[int, Tensor]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def objective_of(**fields: object) -> Objective:
    terms = {"states": {"loss": "representation", **fields}}
    return Objective(msgspec.convert({"support": "sampled", "terms": terms}, ObjectiveConfig))


def written(models: tuple[str, ...] = ("teacher",)) -> CompletionTokens:
    distributions = {model: random_logprobs(TOKENS, 10, seed=seed) for seed, model in enumerate(models)}
    return make_tokens(torch.arange(TOKENS), {"teacher": distributions[models[0]], **distributions})


def aligned(
    objective: Objective, states: dict[int, Tensor], sent: dict[str, dict[str, Tensor]], logprobs: Tensor | None = None
) -> Aligned:
    tokens = written(tuple(sent))
    plan = objective.plan(tokens, None)
    said = torch.zeros(TOKENS, dtype=torch.float64) if logprobs is None else logprobs
    return Aligned(*objective.align(states, sent, tokens, plan, said, DEPTH))


def student_states(layers: tuple[int, ...] = LAYERS) -> dict[int, Tensor]:
    return {layer: random(TOKENS, WIDTH, seed=layer) for layer in layers}


def close(found: Tensor, due: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(found - due) <= 1e-8 * torch.linalg.vector_norm(due))


def make_bank() -> ProjectionBank:
    widths = {"student": WIDTH, "teacher": TEACHER_WIDTH}
    projections = {side: random(2, RANK, width, seed=width).float() for side, width in widths.items()}
    means = {side: random(2, width, seed=width + 1).float() for side, width in widths.items()}
    layers, depths = {"student": LAYERS, "teacher": (3, 6)}, {"student": DEPTH, "teacher": 6}
    return ProjectionBank(layers, depths, projections, means)  # type: ignore[arg-type]


def test_the_raw_gradient_is_twice_the_difference_over_width_and_layers() -> None:
    states, sent = student_states(), random(TOKENS, 2 * WIDTH, seed=9)
    result = aligned(objective_of(layers=LAYERS), states, {"teacher": {"layers": sent}})
    for place, layer in enumerate(LAYERS):
        difference = states[layer] - sent[:, place * WIDTH : (place + 1) * WIDTH]
        assert close(result.gradients[layer], 2 * difference / (WIDTH * 2))
    expected = (torch.stack([*states.values()], 1) - sent.view(TOKENS, 2, WIDTH)).square().mean((1, 2))
    assert close(result.losses, expected)


def test_by_the_targets_root_mean_square_the_gradient_is_divided_by_its_square() -> None:
    states, sent = student_states((4,)), random(TOKENS, WIDTH, seed=9)
    result = aligned(objective_of(normalise="rms"), states, {"teacher": {"hidden": sent}})
    squares = sent.square().mean(-1, keepdim=True)
    assert close(result.gradients[4], 2 * (states[4] - sent) / (WIDTH * squares))


def test_by_lengths_the_gradient_is_what_turns_the_student() -> None:
    states, sent = student_states((4,)), random(TOKENS, WIDTH, seed=9)
    result = aligned(objective_of(normalise="l2"), states, {"teacher": {"hidden": sent}})
    length = states[4].norm(dim=-1, keepdim=True)
    ours, theirs = states[4] / length, sent / sent.norm(dim=-1, keepdim=True)
    cosine = (ours * theirs).sum(-1, keepdim=True)
    assert close(result.gradients[4], -2 * (theirs - cosine * ours) / (WIDTH * length))
    assert close(result.losses, (2 - 2 * cosine[:, 0]) / WIDTH)


def test_through_a_bank_the_gradient_goes_back_by_the_students_map(tmp_path: Path) -> None:
    bank = make_bank()
    bank.save(tmp_path / "bank")
    states = student_states()
    of_teacher = {layer: random(TOKENS, TEACHER_WIDTH, seed=20 + layer) for layer in (3, 6)}
    sent = torch.cat([bank.project("teacher", layer, values) for layer, values in of_teacher.items()], -1)
    objective = objective_of(layers=LAYERS, bank=str(tmp_path / "bank"))
    result = aligned(objective, states, {"teacher": {"layers": sent}})
    for place, layer in enumerate(LAYERS):
        projection, mean = (part["student"][place].double() for part in (bank.projections, bank.means))
        difference = (states[layer] - mean) @ projection.T - sent[:, place * RANK : (place + 1) * RANK]
        assert close(result.gradients[layer], 2 * difference @ projection / (RANK * 2))
    assert not any(part.requires_grad for part in (*bank.projections.values(), *bank.means.values(), sent))


def test_a_target_of_teacher_and_base_is_the_mixture_of_their_states() -> None:
    states = student_states((4,))
    teacher, base = random(TOKENS, WIDTH, seed=9), random(TOKENS, WIDTH, seed=10)
    objective = objective_of(target={"teacher": 1.25, "base": -0.25})
    result = aligned(objective, states, {"teacher": {"hidden": teacher}, "base": {"hidden": base}})
    assert close(result.gradients[4], 2 * (states[4] - (1.25 * teacher - 0.25 * base)) / WIDTH)


def test_equal_states_have_no_loss_and_no_gradient_and_those_of_another_row_do() -> None:
    states = student_states()
    sent = torch.cat([*states.values()], -1)
    for normalise in ("none", "rms", "l2"):
        objective = objective_of(layers=LAYERS, normalise=normalise)
        same, shifted = (aligned(objective, states, {"teacher": {"layers": rows}}) for rows in (sent, sent.roll(1, 0)))
        assert same.losses.abs().max() < 1e-30
        assert max(values.abs().max() for values in same.gradients.values()) < 1e-15
        assert same.errors.max() < 1e-14
        assert shifted.errors.min() > 0.5
        assert shifted.losses.min() > 1e-2


def test_rotations_and_scales_change_what_they_must() -> None:
    states, sent = student_states((4,))[4], random(TOKENS, WIDTH, seed=9)
    turn, _ = torch.linalg.qr(random(WIDTH, WIDTH, seed=11))

    def loss(normalise: str, student: Tensor, teacher: Tensor) -> Tensor:
        return aligned(objective_of(normalise=normalise), {4: student}, {"teacher": {"hidden": teacher}}).losses

    for normalise in ("none", "rms", "l2"):
        assert torch.allclose(loss(normalise, states @ turn, sent @ turn), loss(normalise, states, sent))
        assert not torch.allclose(loss(normalise, states @ turn, sent), loss(normalise, states, sent))
    assert torch.allclose(loss("l2", 3 * states, sent / 7), loss("l2", states, sent))
    assert torch.allclose(loss("rms", 3 * states, 3 * sent), loss("rms", states, sent))


def test_a_condition_and_a_weight_count_as_in_every_term() -> None:
    states, sent = student_states((4,)), random(TOKENS, WIDTH, seed=9)
    plain = aligned(objective_of(), states, {"teacher": {"hidden": sent}})
    logprobs = written().logprobs["teacher"] + torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    chosen = aligned(
        objective_of(when="log_ratio_positive", weight=3.0), states, {"teacher": {"hidden": sent}}, logprobs
    )
    assert torch.allclose(chosen.losses, plain.losses * torch.tensor([0.0, 3.0, 0.0, 3.0, 0.0]))


def test_the_last_layers_difference_bounds_that_of_the_logits() -> None:
    # With one LM head: |W_v h_S - W_v h_T| <= |W_v| |h_S - h_T|.
    states, sent = student_states((4,))[4], random(TOKENS, WIDTH, seed=9)
    head = random(30, WIDTH, seed=12)
    losses = aligned(objective_of(), {4: states}, {"teacher": {"hidden": sent}}).losses
    distance = (losses * WIDTH).sqrt()[:, None]
    assert (((states - sent) @ head.T).abs() <= head.norm(dim=-1) * distance + 1e-12).all()


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"target": {"teacher": 1.0, "base": -1.0}}, "sum to 0"),
        ({"when": "outside_support"}, "before it is known"),
        ({"layers": []}, "names none"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], fault: str) -> None:
    term = msgspec.convert({"loss": "representation", **fields}, RepresentationTerm)
    assert fault in (term.fault("topk") or "")


def test_a_missing_or_damaged_bank_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="there is no such file; make it with `preceptor fit-projection`"):
        objective_of(bank=str(tmp_path / "none"))
    bank = make_bank()
    bank.save(tmp_path / "bank")
    data = bytearray((tmp_path / "bank").read_bytes())
    data[-1] ^= 1
    (tmp_path / "bank").write_bytes(data)
    with pytest.raises(Exception, match="not those it was written with"):
        objective_of(bank=str(tmp_path / "bank"))
    assert math.isclose(bank.means["student"].sum(), bank.select(LAYERS).means["student"].sum())
