"""A student that the learner cannot pack is refused from its files alone; as a teacher it is welcome."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Lfm2Config, PretrainedConfig, Qwen3NextConfig

from cluster.config.sections import StudentConfig
from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ModelError
from cluster.models.model_checks import read_model
from tests.tiny_qwen3 import CONTEXT_TOKENS, NUM_WORDS, write_tiny_qwen3

SIZES = {
    "vocab_size": NUM_WORDS,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT_TOKENS,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
LINEAR = {"linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HYBRIDS: dict[str, PretrainedConfig] = {
    "linear_attention": Qwen3NextConfig(
        **SIZES, **EXPERTS, **LINEAR, head_dim=16, layer_types=["linear_attention", "full_attention"]
    ),
    "conv": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_student_is_refused_and_may_teach(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(HYBRIDS[kind]).save_pretrained(folder)
    with pytest.raises(ModelError, match=f"has {kind} layers, which carry a state from one token to the next"):
        read_model(StudentConfig(str(folder)), is_student=True)
    assert read_model(TeacherConfig(str(folder)), is_student=False).vocabulary == NUM_WORDS
