"""Multiplies bfloat16 in float32 on CPUs that have no bfloat16 products, where torch's own take four times as long.

The factors are bfloat16 and the product is rounded to it, as before: torch sums in float32 as well.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def widen(model: nn.Module) -> None:
    """Let every linear layer of the model multiply in float32; parameters and results keep their dtype."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(linear: nn.Linear, inputs: Tensor) -> Tensor:
    product: Tensor = _WideProduct.apply(inputs, linear.weight, linear.bias)  # type: ignore[no-untyped-call]
    return product


class _WideProduct(torch.autograd.Function):
    """Computes `functional.linear` of inputs [..., width], and its gradients."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        product = functional.linear(inputs.float(), weight.float(), None if bias is None else bias.float())
        return product.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        inputs, weight = ctx.saved_tensors
        wide = gradient.float()
        rows = wide.flatten(0, -2)
        of_weight = rows.t() @ inputs.float().flatten(0, -2)
        of_bias = rows.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return (wide @ weight.float()).to(inputs.dtype), of_weight.to(weight.dtype), of_bias
