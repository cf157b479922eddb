"""States of layers are those of the residual stream, however a family of models hands it from block to block."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.contracts.errors import ModelError
from cluster.models.hidden_layers import ProjectionBank
from cluster.vllm.engine import LayersToSend
from cluster.vllm.layer_states import LayerStates

DEPTH, WIDTH, TOKENS = 3, 8, 5
KINDS = ["sum", "tensor", "first", "batched"]


class Block(nn.Module):
    """Adds something to the residual stream, and hands it on as families of models do."""

    def __init__(self, kind: str, number: int) -> None:
        super().__init__()
        self.kind, self.step = kind, number / 10

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Any:
        if self.kind == "sum":  # Llama: the next block adds both, in the memory of either
            stream = hidden if residual is None else residual.add_(hidden)
            mlp = stream.roll(1, -1) * self.step
            return (hidden.copy_(mlp) if residual is not None else mlp), stream.clone() if residual is None else stream
        stream = hidden + hidden.roll(1, -1) * self.step
        return (stream, hidden) if self.kind == "first" else stream  # Cohere; GPT-2


class Decoder(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([Block(kind, number) for number in range(1, DEPTH + 1)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        residual = None
        hidden = hidden[None] if self.kind == "batched" else hidden
        for layer in self.layers:
            outputs = layer(hidden, residual)
            hidden, residual = outputs if isinstance(outputs, tuple) else (outputs, None)
        stream = hidden + residual if self.kind == "sum" else hidden
        result: Tensor = self.norm(stream)
        return result[0] if self.kind == "batched" else result


class Model(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.vision = nn.ModuleList([nn.Identity()] * DEPTH)  # as long, but no norm stands beside it
        self.model = Decoder(kind)


def rows() -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def stream_after(layer: int) -> Tensor:
    state = rows()
    for number in range(1, layer + 1):
        state = state + state.roll(1, -1) * number / 10
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_residual_stream_and_the_last_ones_are_normed(kind: str) -> None:
    model = Model(kind)
    states = LayerStates(model, DEPTH, LayersToSend((1, 2, 3)))
    for _ in range(2):  # the first time, the sum is found out
        output = model.model(rows())
        sent = states.beside(output)
        last, *of_layers = sent.split(WIDTH, dim=-1)
        assert torch.equal(last, output)
        assert torch.allclose(of_layers[0], stream_after(1), atol=1e-6)
        assert torch.allclose(of_layers[1], stream_after(2), atol=1e-6)
        assert torch.equal(of_layers[2], output)


def test_a_warm_up_of_zeros_or_nothing_finite_decides_nothing() -> None:
    model = Model("first")
    states = LayerStates(model, DEPTH, LayersToSend((2,)))
    for value in (0.0, float("nan")):
        assert states.beside(model.model(torch.full((TOKENS, WIDTH), value))).shape == (TOKENS, 2 * WIDTH)
    assert torch.allclose(states.beside(model.model(rows()))[:, WIDTH:], stream_after(2), atol=1e-6)


def test_a_bank_projects_what_is_sent_in_the_models_dtype(tmp_path: Path) -> None:
    projection, mean = torch.randn(2, 4, WIDTH), torch.randn(2, WIDTH)
    sides = dict.fromkeys(("student", "teacher"), (1, 3))
    bank = ProjectionBank(
        sides,  # type: ignore[arg-type]
        dict.fromkeys(sides, DEPTH),  # type: ignore[arg-type]
        dict.fromkeys(sides, projection),  # type: ignore[arg-type]
        dict.fromkeys(sides, mean),  # type: ignore[arg-type]
    )
    bank.save(tmp_path / "bank")
    model = Model("tensor")
    states = LayerStates(model, DEPTH, LayersToSend((1, 3), str(tmp_path / "bank"), bank.digest))
    output = model.model(rows())
    sent = states.beside(output)
    assert sent.shape == (TOKENS, WIDTH + 2 * 4)
    assert torch.allclose(sent[:, WIDTH : WIDTH + 4], (stream_after(1) - mean[0]) @ projection[0].T, atol=1e-5)
    assert torch.allclose(sent[:, WIDTH + 4 :], (output - mean[1]) @ projection[1].T, atol=1e-5)
    with pytest.raises(ModelError, match="another one on this node"):
        LayerStates(model, DEPTH, LayersToSend((1, 3), str(tmp_path / "bank"), "other"))


def test_a_model_whose_layers_are_not_found_or_not_understood_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of 4 decoder layers"):
        LayerStates(Model("sum"), 4, LayersToSend((1,)))
    model = Model("tensor")
    states = LayerStates(model, DEPTH, LayersToSend((1,)))
    with pytest.raises(ModelError, match="something else than a residual stream"):
        states.beside(model.model(rows()) + 1)
