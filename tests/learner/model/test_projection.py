"""Logits that are rounded to the weights' dtype, and those that are not."""

import pytest
import torch
from torch import nn

from learner.batching.micro_batch import build_micro_batch, trajectories
from learner.loss.objective import Objective
from learner.model.completion_head import CompletionHead
from learner.model.projection import LogitScaling, Projection, adds_wide
from tests.learner.support import OBJECTIVES, VOCABULARY, make_scored

WIDTH = 24


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def logits_of(rounds, bias=None):
    """Return what a bfloat16 head makes of bfloat16 hidden states, and the products in float64."""
    weight, hidden = random(VOCABULARY, WIDTH, seed=1), random(40, WIDTH, seed=2)
    projection = Projection(hidden, weight, bias, LogitScaling(rounds=rounds), with_gradient=False)
    exact = hidden.double() @ weight.double().t() + (0 if bias is None else bias.double())
    return projection.logits(torch.arange(40)).double(), exact


@pytest.mark.parametrize("bias", [None, torch.full((VOCABULARY,), 0.5, dtype=torch.bfloat16)])
def test_logits_in_float32_are_not_rounded_to_the_weights_dtype(bias):
    wide, exact = logits_of(rounds=False, bias=bias)
    rounded, _ = logits_of(rounds=True, bias=bias)
    assert (wide - exact).abs().max() < 1e-5
    assert (rounded - exact).abs().max() > 1e-2  # logits up to 16 in steps of 1/16


def test_on_a_gpu_the_gradient_of_the_weight_is_summed_up_without_rounding_each_part(monkeypatch):
    """The product that only a GPU has is computed in float32 here."""
    weight, hidden = random(VOCABULARY, WIDTH, seed=1), random(64, WIDTH, seed=2)
    gradient = random(64, VOCABULARY, seed=3)
    exact = gradient.double().t() @ hidden.double()

    def add(into, left, right, out_dtype, out):
        assert out is into
        assert out_dtype == torch.float32
        assert left.dtype == right.dtype == torch.bfloat16
        return out.add_(left.float() @ right.float())

    monkeypatch.setattr("learner.model.projection.multiplies_wide", lambda dtype, device: False)
    off = {}
    for is_wide in (False, True):
        monkeypatch.setattr("learner.model.projection.adds_wide", lambda device, is_wide=is_wide: is_wide)
        monkeypatch.setattr(torch, "addmm", add)
        projection = Projection(hidden, weight, None, LogitScaling(), with_gradient=True)
        for chunk in torch.arange(64).split(16):
            projection.logits(chunk)
            projection.backward(chunk, gradient[chunk].float())
        off[is_wide] = (projection.gradients[1].double() - exact).norm() / exact.norm()
    assert off[True] < 1e-6 < 1e-3 < off[False]


def test_a_cpu_has_no_such_product():
    assert not adds_wide(torch.device("cpu"))


@pytest.mark.parametrize("head_dtype", ["float32", "bfloat16"])
def test_the_head_hands_back_gradients_in_the_weights_dtype_whatever_its_logits_are(head_dtype):
    objective = OBJECTIVES["topk"]
    batch = build_micro_batch(((0, 1), (2, 3)), trajectories([make_scored(objective)]), seed=0)
    linear = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
    head, hidden = CompletionHead(linear, LogitScaling(), head_dtype), random(len(batch.tokens), WIDTH, seed=2)
    loss, *_ = head(hidden.requires_grad_(), batch, Objective(objective), {})
    loss.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    assert hidden.grad.isfinite().all()


def test_gradients_of_more_chunks_than_bfloat16_can_count_add_up():
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    projection = Projection(one.repeat(300, 1), one, None, LogitScaling(), with_gradient=True)
    for place in range(300):
        projection.logits(torch.tensor([place]))
        projection.backward(torch.tensor([place]), torch.ones(1, 1))
    _, of_weight, _ = projection.gradients
    assert of_weight.item() == 300  # in bfloat16, 256 + 1 is 256


def test_a_gpu_multiplies_into_float32_without_a_copy_of_the_weight():
    """On the meta device torch checks the call and works out shape and dtype, as it would on CUDA."""
    weight, hidden = (torch.empty(rows, WIDTH, dtype=torch.bfloat16, device="meta") for rows in (VOCABULARY, 5))
    projection = Projection(hidden, weight, None, LogitScaling(rounds=False), with_gradient=False)
    logits = projection.logits(torch.arange(5, device="meta"))
    assert (logits.shape, logits.dtype) == ((5, VOCABULARY), torch.float32)
