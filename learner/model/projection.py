"""Multiplies hidden states by the LM head's weight, chunk by chunk, and brings the gradients back."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cluster.models.lm_head import multiplies_wide
from cluster.models.stop_class import merge_logits, split_gradient


@dataclass(frozen=True)
class LogitScaling:
    """Says how the product of hidden states and weight becomes float32 logits."""

    factor: float = 1.0
    softcap: float | None = None  # logits are squeezed into (-softcap, softcap)
    rounds: bool = True  # the product, to the weight's dtype; the gradients' products always are
    stop_class: tuple[int, ...] = ()  # ids that count as one token, the first for all


class Projection:
    """Computes logits in a buffer that every chunk uses again: a CPU spends as long on fresh memory as on a softmax.

    Hidden states are [tokens, width], the weight is [vocabulary, width]. `with_gradient`: `backward` will be called.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: LogitScaling, with_gradient: bool
    ) -> None:
        self._hidden, self._weight, self._bias, self._scaling = hidden, weight, bias, scaling
        self._rounds = scaling.rounds or weight.dtype == torch.float32
        # A GPU multiplies bfloat16 into float32; a CPU has no such product and takes a float32 copy of the weight.
        is_wide = multiplies_wide(weight.dtype, weight.device) or (not self._rounds and weight.device.type == "cpu")
        self._wide = weight.float() if is_wide else None
        self._buffer = hidden.new_empty(0, len(weight), dtype=torch.float32)
        self._slope: Tensor | None = None  # of the soft cap at the latest logits
        self._shares: Tensor | None = None  # of each id in its class, at the latest logits
        # Sums over the chunks so far, by what the head was given: hidden states in their dtype; weight and bias in
        # float32 whatever they are, for many chunks add up.
        self.gradients: tuple[Tensor, Tensor, Tensor | None] | None = None
        if with_gradient:
            of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
            self.gradients = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32), of_bias

    def logits(self, chosen: Tensor) -> Tensor:
        """Return float32 logits [n, vocabulary] of tokens chosen by index; the caller may overwrite them."""
        hidden = self._hidden[chosen]
        if len(self._buffer) < len(hidden):
            self._buffer = self._buffer.new_empty(len(hidden), len(self._weight))
        logits = self._buffer[: len(hidden)]
        if self._rounds and self._wide is None:
            _multiply_rounded(hidden, self._weight, self._bias, logits)
        else:
            self._multiply_wide(hidden, logits)
            if self._rounds:
                logits.copy_(logits.to(self._weight.dtype))
        if self._scaling.factor != 1.0:
            logits *= self._scaling.factor
        softcap = self._scaling.softcap
        if softcap is not None:
            logits.div_(softcap).tanh_()
            self._slope = None if self.gradients is None else 1 - logits.square()
            logits *= softcap
        if self._scaling.stop_class:
            self._shares = merge_logits(logits, self._scaling.stop_class)
        return logits

    def backward(self, chosen: Tensor, gradient: Tensor) -> None:
        """Take in the gradient [n, vocabulary] by the latest logits, which were those of the same tokens."""
        assert self.gradients is not None, "the projection was made without gradients"
        of_hidden, of_weight, of_bias = self.gradients
        if self._shares is not None:
            split_gradient(gradient, self._scaling.stop_class, self._shares)
        if self._slope is not None:
            gradient *= self._slope
        if self._scaling.factor != 1.0:
            gradient *= self._scaling.factor
        if of_bias is not None:
            of_bias.add_(gradient.sum(0))
        gradient = gradient.to(self._weight.dtype)
        if self._wide is not None:
            gradient = gradient.float()
        of_hidden[chosen] = (gradient @ (self._weight if self._wide is None else self._wide)).to(of_hidden.dtype)
        if gradient.dtype == torch.float32:
            of_weight.addmm_(gradient.t(), self._hidden[chosen].float())
        elif adds_wide(gradient.device):
            # Sums in float32, and makes no [vocabulary, width] product to add.
            torch.addmm(of_weight, gradient.t(), self._hidden[chosen], out_dtype=torch.float32, out=of_weight)
        else:
            of_weight.add_(gradient.t() @ self._hidden[chosen])

    def _multiply_wide(self, hidden: Tensor, logits: Tensor) -> None:
        if self._wide is None:
            torch.mm(hidden, self._weight.t(), out_dtype=torch.float32, out=logits)
        else:
            torch.mm(hidden.float(), self._wide.t(), out=logits)
        if self._bias is not None:
            logits += self._bias


def adds_wide(device: torch.device) -> bool:
    """Return whether torch adds a product of bfloat16 to a float32 matrix there; a CPU does not, nor an older torch."""
    return device.type == "cuda" and hasattr(torch.ops.aten.addmm, "dtype_out")


def _multiply_rounded(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    if weight.dtype == torch.float32 and bias is None:
        torch.mm(hidden, weight.t(), out=logits)
    else:
        logits.copy_(functional.linear(hidden, weight, bias))
