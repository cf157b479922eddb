"""Lets a model in vLLM return the hidden states of several layers beside the last ones, of one prefill.

vLLM's pooling models return the states after the final norm alone, and drop what EAGLE's models collect on the way. A
model that is to send layers (`token_scoring.py`) returns `cat([last, state of layer 1, ...], -1)`, each state projected
by a bank where there is one. Hooks on the decoder layers take the states, so that no family of models needs to support
it; they need a model that runs eagerly.

This file imports vLLM in `register` only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cluster.contracts.errors import ModelError
from cluster.models.hidden_layers import ProjectionBank, load_bank
from cluster.vllm.engine import LayersToSend

FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm")
# Of the norm: how far the final norm of the last layer's states may be from what the model returned. Another sum than
# the residual stream is farther off than its length.
NORM_TOLERANCE = 0.02


def register() -> None:
    """Let models score tokens and send layers where an engine is to; vLLM calls this in each of its processes."""
    from vllm.model_executor.models import adapters

    from cluster.vllm.token_scoring import scoring_tokens

    convert = adapters.as_embedding_model
    if not hasattr(convert, "scores_tokens"):  # vLLM may load plugins twice in a process
        adapters.as_embedding_model = scoring_tokens(convert)


class LayerStates:
    """Collects the states of some decoder layers while a model runs, and returns them beside its own output."""

    def __init__(self, model: nn.Module, depth: int, to_send: LayersToSend) -> None:
        """Hook the layers of a model of so many; raise ModelError if the model is built in an unknown way."""
        self._layers, self._depth = to_send.layers, depth
        self._bank: ProjectionBank | None = None
        if to_send.bank is not None:
            self._bank = load_bank(to_send.bank, to_send.digest)
        self._collected: dict[int, Tensor] = {}
        # Whether a layer's two outputs add up to the residual stream; None: not known before the model has run.
        self._adds_residual: bool | None = None
        blocks, self._norm = find_decoder(model, depth)
        for layer in {*(layer for layer in self._layers if layer < depth), depth}:
            blocks[layer - 1].register_forward_hook(self._hook(layer))

    def beside(self, output: Any) -> Any:
        """Return `cat([output, states...], -1)`, [tokens, width + width of all states], in the output's dtype."""
        if not isinstance(output, Tensor):  # of a stage of a pipeline that has no last hidden states
            return output
        if self._adds_residual is None:
            self._find_sum(output)
        states = [output if layer == self._depth else self._collected[layer] for layer in self._layers]
        if self._bank is not None:
            pairs = zip(self._layers, states, strict=True)
            states = [self._bank.project("teacher", layer, values) for layer, values in pairs]
        self._collected = {}
        return torch.cat([output, *(values.to(output.dtype) for values in states)], dim=-1)

    def _hook(self, layer: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            parts = tuple(part for part in outputs if isinstance(part, Tensor)) if isinstance(outputs, tuple) else ()
            parts = parts or (outputs,)
            # Now, for the next layer's fused norm writes into both tensors.
            if self._adds_residual is None:
                self._collected[layer] = torch.stack([_rows(part) for part in parts[:2]])
            elif layer in self._layers and layer < self._depth:
                state = parts[0] + parts[1] if self._adds_residual and len(parts) > 1 else parts[0].clone()
                self._collected[layer] = _rows(state)

        return keep

    def _find_sum(self, output: Tensor) -> None:
        """Find out by the final norm what the last layer's outputs add up to, and add the collected ones up so.

        An output of zeros or NaN, of a model that warms up, tells nothing.

        Raises:
            ModelError: no sum of the last layer's outputs becomes the model's own output.
        """
        last, length = self._collected[self._depth], torch.linalg.vector_norm(output.float())
        for adds, state in ((True, last.sum(0)), (False, last[0])):
            normed = self._norm(state.clone())
            normed = _rows(normed[0] if isinstance(normed, tuple) else normed)
            if torch.linalg.vector_norm((normed - output).float()) <= NORM_TOLERANCE * length and length > 0:
                self._adds_residual = adds
                break
        if self._adds_residual is None and length > 0:  # not of NaN
            raise ModelError(
                "vLLM's decoder layers of this model return something else than a residual stream, so their states "
                "cannot be sent; compare the last layer alone (layers = 'last', without a bank)"
            )
        adds = self._adds_residual is not False
        self._collected = {layer: parts.sum(0) if adds else parts[0] for layer, parts in self._collected.items()}


def _rows(values: Tensor) -> Tensor:
    """Return [tokens, width]; models that vLLM runs by transformers' classes have a batch dimension of 1."""
    return values.flatten(0, -2)


def find_decoder(model: nn.Module, depth: int) -> tuple[nn.ModuleList, nn.Module]:
    """Return a causal LM's decoder layers, all on this rank, and the norm behind them.

    Raises:
        ModelError: the model has no such list.
    """
    for holder in model.modules():
        blocks = [part for part in holder.children() if isinstance(part, nn.ModuleList) and len(part) == depth]
        norms = [part for name, part in holder.named_children() if name in FINAL_NORMS]
        if blocks and norms:
            return blocks[0], norms[0]
    raise ModelError(
        f"vLLM's {type(model).__name__} has no list of {depth} decoder layers with a final norm beside it, so their "
        "states cannot be sent; compare the last layer alone (layers = 'last', without a bank)"
    )
