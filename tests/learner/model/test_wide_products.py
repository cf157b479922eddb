import copy
import time

import pytest
import torch
from torch import nn

from cluster.models.lm_head import multiplies_wide
from learner.model.wide_products import widen

TOKENS, WIDTH, OUT = 64, 48, 80
CPU = torch.device("cpu")


@pytest.mark.parametrize("bias", [True, False])
def test_product_and_gradients_are_those_of_bfloat16_up_to_its_rounding(bias: bool) -> None:
    torch.manual_seed(0)
    usual = nn.Linear(WIDTH, OUT, bias=bias, dtype=torch.bfloat16)
    wide = copy.deepcopy(usual)
    widen(wide)
    given = torch.randn(2, TOKENS, WIDTH).bfloat16()
    weights = torch.randn(2, TOKENS, OUT).bfloat16()
    found = []
    for linear in (usual, wide):
        inputs = given.clone().requires_grad_()
        product = linear(inputs)
        (product * weights).float().sum().backward()
        found.append([product, inputs.grad, *(parameter.grad for parameter in linear.parameters())])
    for ours, torchs in zip(found[1], found[0], strict=True):
        assert ours.dtype == torch.bfloat16
        # One rounding each, to 8 bits, of the same sum.
        torch.testing.assert_close(ours.float(), torchs.float(), rtol=2**-7, atol=2**-7 * float(torchs.abs().max()))


def test_it_is_done_where_it_is_faster_only() -> None:
    assert not multiplies_wide(torch.float32, CPU)
    assert not multiplies_wide(torch.bfloat16, torch.device("cuda"))
    usual = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    wide = copy.deepcopy(usual)
    widen(wide)
    inputs = torch.randn(512, 1024).bfloat16()
    if multiplies_wide(torch.bfloat16, CPU):
        assert seconds(wide, inputs) < seconds(usual, inputs)


def seconds(linear: nn.Linear, inputs: torch.Tensor) -> float:
    """Return the shortest of several times, in CPU-seconds."""
    times = []
    for _ in range(5):
        began = time.process_time()
        linear(inputs)
        times.append(time.process_time() - began)
    return min(times)
