"""What autograd keeps of a micro-batch, counted, against what the memory plan takes for it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from cluster.models.model_size import size_of
from cluster.placement.memory import activation_bytes

TOKENS = 128
SHAPE = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 128}
CONFIGS = {
    # Grouped queries, heads wider than width / heads, and norms of queries and keys.
    "qwen3": (Qwen3Config, {**SHAPE, "intermediate_size": 192, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3, tied": (
        Qwen3Config,
        {**SHAPE, "intermediate_size": 256, "num_key_value_heads": 8, "head_dim": 8, "tie_word_embeddings": True},
    ),
    "llama": (LlamaConfig, {**SHAPE, "intermediate_size": 176, "num_key_value_heads": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            **SHAPE,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
}


class FlashLike(torch.autograd.Function):
    """Keeps for its backward what flash attention does: queries, keys, values, the result, and a sum for each head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.zeros_like(query)
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[:2]))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[1:3])


def flash_like(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **requests: Any
) -> tuple[Tensor, None]:
    """Stand in for the kernels of CUDA, which the learner takes there (`learner/model/attention.py`)."""
    rows = (part[0].transpose(0, 1) for part in (query, key, value))
    attended: Tensor = FlashLike.apply(*rows)  # type: ignore[no-untyped-call]
    return attended.unsqueeze(0), None


def kept_bytes(kind: str, layers: int, dtype: torch.dtype, recomputes: bool) -> int:
    """Return the bytes of all storages that autograd keeps of one forward, but those of parameters."""
    make, values = CONFIGS[kind]
    config = make(**values, num_hidden_layers=layers)
    AttentionInterface.register("counted", flash_like)
    config._attn_implementation = "counted"
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).to(dtype).train()
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.get_decoder()(input_ids=ids, use_cache=False)
    assert out.last_hidden_state.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_layer_keeps_what_the_plan_takes_for_it(kind: str, dtype: torch.dtype) -> None:
    make, values = CONFIGS[kind]
    layer = (kept_bytes(kind, 2, dtype, False) - kept_bytes(kind, 1, dtype, False)) / TOKENS
    planned = size_of(make(**values, num_hidden_layers=1)).saved_bytes_per_token(dtype.itemsize)
    assert planned == pytest.approx(layer, rel=0.03), (planned, layer)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_with_checkpointing_a_layer_keeps_its_input_alone(kind: str) -> None:
    make, values = CONFIGS[kind]
    layer = (kept_bytes(kind, 3, torch.bfloat16, True) - kept_bytes(kind, 1, torch.bfloat16, True)) / 2 / TOKENS
    several, few = (size_of(make(**values, num_hidden_layers=layers)) for layers in (3, 1))
    planned = activation_bytes(several, 1, 2, True) - activation_bytes(few, 1, 2, True)
    assert planned / 2 == 64 * 2 == layer
