"""The products with the LM head's weight: hidden states to logits, chunk by chunk, and the gradients' way back."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LogitScaling:
    """What the model does to the product."""

    factor: float = 1.0
    softcap: float | None = None  # logits are squeezed into (-softcap, softcap)


@dataclass(frozen=True)
class Treatment:
    """How hidden states become logits."""

    scaling: LogitScaling = LogitScaling()
    rounds: bool = True  # to the weight's dtype, before they are made float32; the gradients' products always are


@dataclass(frozen=True)
class HeadGradients:
    """Sums over the chunks so far, of the losses by what the head was given."""

    hidden: Tensor  # [tokens, width] in the dtype of the hidden states
    weight: Tensor  # [vocabulary, width] float32 whatever the weight is: many chunks add up
    bias: Tensor | None  # [vocabulary] float32

    def times(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients times a scalar in a dtype; they are overwritten, for they are as large as the weight."""
        bias = None if self.bias is None else self.bias.mul_(factor).to(dtype)
        return self.hidden.mul_(factor), self.weight.mul_(factor).to(dtype), bias


class Projection:
    """Computes logits in a buffer that every chunk uses again: a CPU spends as long on fresh memory as on a softmax.

    Args:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        bias: [vocabulary].
        treatment: what the logits are.
        with_gradient: whether `backward` will be called.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, treatment: Treatment, with_gradient: bool
    ) -> None:
        self._hidden, self._weight, self._bias, self._scaling = hidden, weight, bias, treatment.scaling
        self._rounds = treatment.rounds or weight.dtype == torch.float32
        # A GPU multiplies bfloat16 into float32; a CPU has no such product and takes a float32 copy of the weight.
        self._wide = weight.float() if not self._rounds and weight.device.type == "cpu" else None
        self._buffer = hidden.new_empty(0, len(weight), dtype=torch.float32)
        self._slope: Tensor | None = None  # of the soft cap at the latest logits
        self.gradients: HeadGradients | None = None
        if with_gradient:
            of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            of_weight = torch.zeros_like(weight, dtype=torch.float32)
            self.gradients = HeadGradients(torch.zeros_like(hidden), of_weight, of_bias)

    def logits(self, chosen: Tensor) -> Tensor:
        """Return float32 logits [n, vocabulary] of tokens chosen by index; the caller may overwrite them."""
        hidden = self._hidden[chosen]
        if len(self._buffer) < len(hidden):
            self._buffer = self._buffer.new_empty(len(hidden), len(self._weight))
        logits = self._buffer[: len(hidden)]
        if self._rounds:
            _multiply_rounded(hidden, self._weight, self._bias, logits)
        else:
            self._multiply_wide(hidden, logits)
        return self._scale(logits)

    def backward(self, chosen: Tensor, gradient: Tensor) -> None:
        """Take in the gradient [n, vocabulary] by the latest logits, which were those of the same tokens."""
        assert self.gradients is not None, "the projection was made without gradients"
        if self._slope is not None:
            gradient *= self._slope
        if self._scaling.factor != 1.0:
            gradient *= self._scaling.factor
        if self.gradients.bias is not None:
            self.gradients.bias.add_(gradient.sum(0))
        gradient = gradient.to(self._weight.dtype)
        self.gradients.hidden[chosen] = gradient @ self._weight
        if gradient.dtype == torch.float32:
            self.gradients.weight.addmm_(gradient.t(), self._hidden[chosen])
        else:
            self.gradients.weight.add_(gradient.t() @ self._hidden[chosen])

    def _multiply_wide(self, hidden: Tensor, logits: Tensor) -> None:
        """Write the product in float32."""
        if self._wide is None:
            torch.mm(hidden, self._weight.t(), out_dtype=torch.float32, out=logits)
        else:
            torch.mm(hidden.float(), self._wide.t(), out=logits)
        if self._bias is not None:
            logits += self._bias

    def _scale(self, logits: Tensor) -> Tensor:
        if self._scaling.factor != 1.0:
            logits *= self._scaling.factor
        softcap = self._scaling.softcap
        if softcap is not None:
            logits.div_(softcap).tanh_()
            self._slope = None if self.gradients is None else 1 - logits.square()
            logits *= softcap
        return logits


def _multiply_rounded(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Write the product as it comes in the weight's dtype."""
    if weight.dtype == torch.float32 and bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(functional.linear(hidden, weight, bias))
