"""The head alone must say what the whole model says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    PhiConfig,
    PretrainedConfig,
)

from cluster.contracts.errors import ModelError
from cluster.models.lm_head import LmHead, check_lm_head, load_lm_head, read_logit_scaling

VOCABULARY = 50
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,  # random logits of several nats, so that a wrong factor shows
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "bias": PhiConfig(**SIZES, tie_word_embeddings=False),
    "divided": GraniteConfig(**SIZES, logits_scaling=4.0),
    "multiplied": CohereConfig(**SIZES, logit_scale=0.25),
    "soft-capped": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0),
    "other names": GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.5
    ),
}


def save_random(config: PretrainedConfig, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name == "lm_head.bias":
            torch.nn.init.normal_(parameter)  # models start with zeros
    model.save_pretrained(folder, **options)
    return model


@torch.no_grad()
def largest_difference(model: Any, folder: Path) -> float:
    ids = torch.arange(20).unsqueeze(0)
    hidden = model.get_decoder()(ids).last_hidden_state[0]
    return float((load_lm_head(str(folder), False, "float32").logits(hidden) - model(ids).logits[0]).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_alone_gives_the_models_own_logits(family: str, tmp_path: Path) -> None:
    model = save_random(FAMILIES[family], tmp_path)
    assert largest_difference(model, tmp_path) < 1e-5


def test_a_head_in_one_of_several_files_is_found(tmp_path: Path) -> None:
    model = save_random(FAMILIES["untied"], tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert largest_difference(model, tmp_path) < 1e-5


def test_rows_that_pad_the_vocabulary_are_cut(tmp_path: Path) -> None:
    save_random(FAMILIES["untied"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": VOCABULARY - 3}))
    head = load_lm_head(str(tmp_path), False, "bfloat16")
    assert head.weight.shape == (VOCABULARY - 3, 16)
    assert head.weight.dtype == torch.bfloat16
    assert head.logits(torch.zeros(2, 16)).dtype == torch.float32


def replace_head(folder: Path, weight: torch.Tensor | None) -> None:
    save_random(FAMILIES["untied"], folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors if weight is None else {**tensors, "lm_head.weight": weight}, folder / "model.safetensors")


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    replace_head(tmp_path, None)
    with pytest.raises(ModelError, match="its LM head was not found"):
        load_lm_head(str(tmp_path), False, "float32")


def test_a_quantised_head_is_refused(tmp_path: Path) -> None:
    replace_head(tmp_path, torch.zeros(VOCABULARY, 16, dtype=torch.int8))
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is I8 .* not quantised"):
        load_lm_head(str(tmp_path), False, "float32")


def test_a_head_of_too_few_rows_is_refused(tmp_path: Path) -> None:
    replace_head(tmp_path, torch.zeros(VOCABULARY - 1, 16))
    with pytest.raises(ModelError, match="49 rows for 50 tokens"):
        load_lm_head(str(tmp_path), False, "float32")


def test_a_model_without_safetensors_is_refused(tmp_path: Path) -> None:
    save_random(FAMILIES["tied"], tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="save it as safetensors"):
        load_lm_head(str(tmp_path), False, "float32")


def test_one_family_multiplies_by_what_the_others_divide_by() -> None:
    assert read_logit_scaling(AutoConfig.for_model("hyperclovax", logits_scaling=4.0)) == (4.0, None)
    assert read_logit_scaling(GraniteConfig(logits_scaling=4.0)) == (0.25, None)


@pytest.mark.parametrize("bias", [None, torch.ones(VOCABULARY, dtype=torch.bfloat16, device="meta")])
def test_a_gpu_multiplies_bfloat16_into_float32(bias):
    """On the meta device torch checks the call and works out shape and dtype, as it would on CUDA."""
    head = LmHead(torch.empty(VOCABULARY, 16, dtype=torch.bfloat16, device="meta"), bias)
    logits = head.logits(torch.empty(5, 16, device="meta"))
    assert (logits.shape, logits.dtype) == ((5, VOCABULARY), torch.float32)


def test_of_a_model_of_several_parts_the_outer_configuration_says_whether_the_head_is_tied() -> None:
    config = LlavaConfig(text_config=LlamaConfig(**SIZES, tie_word_embeddings=False), tie_word_embeddings=True)
    # Raises if it looks for a head of its own.
    check_lm_head("model", config, {"language_model.model.embed_tokens.weight": (VOCABULARY, SIZES["hidden_size"])})


def test_excluded_ids_beyond_the_vocabulary_exclude_nothing(tmp_path: Path) -> None:
    save_random(FAMILIES["soft-capped"], tmp_path)
    head = load_lm_head(str(tmp_path), False, "float32", excluded_ids=(3, VOCABULARY + 7))
    logits = head.logits(torch.randn(2, 16))
    assert logits.softmax(-1)[:, 3].tolist() == [0, 0]
    assert (logits.softmax(-1) > 0).sum() == 2 * (VOCABULARY - 1)
