"""Published configurations of models from 0.6B to 70B, as their config.json has them."""

from functools import cache
from typing import Any

from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from cluster.models.model_size import ModelSize, size_of

QWEN3: dict[str, Any] = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}


def qwen3(width: int, layers: int, heads: int, inner: int, is_tied: bool) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        tie_word_embeddings=is_tied,
        **QWEN3,
    )


CONFIGS = {
    "0.6B": qwen3(1024, 28, 16, 3072, is_tied=True),
    "1.7B": qwen3(2048, 28, 16, 6144, is_tied=True),
    "4B": qwen3(2560, 36, 32, 9728, is_tied=True),
    "8B": qwen3(4096, 36, 32, 12288, is_tied=False),
    "14B": qwen3(5120, 40, 40, 17408, is_tied=False),
    "32B": qwen3(5120, 64, 64, 25600, is_tied=False),
    "70B": LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128_256,
        tie_word_embeddings=False,
    ),
    "30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151_936,
        tie_word_embeddings=False,
    ),
}
# Numbers of their safetensors.
PARAMETERS = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
    "70B": 70_553_706_496,
    "30B-A3B": 30_532_122_624,
}


@cache
def size(name: str) -> ModelSize:
    return size_of(CONFIGS[name])
