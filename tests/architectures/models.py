"""Tiny random pairs of many architectures, as Hugging Face directories with one tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 640  # the models'; the tokenizer has fewer tokens
CONTEXT_TOKENS = 512
PAD, END, START, EOS = range(4)
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|eos|>"]
LINES = [
    "The student writes, the teacher gives a probability to every token, and the student learns from that.",
    "Two and two are four, four and four are eight, and eight less three is five.",
    "A rollout worker samples a completion; the learner packs it beside others into a micro-batch.",
    "Experts are chosen by a router, a few for each token, and their answers are added up.",
    "Weights travel from the learner to the rollout workers after every optimizer step.",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.2,  # the usual 0.02 makes every distribution uniform
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": PAD,
}
WIDE_HEADS = {**SIZES, "head_dim": 32}  # the least that vLLM's attention takes on a CPU
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT_TOKENS}
GPT2_TOKENS = {name: SIZES[name] for name in ("vocab_size", "initializer_range", "eos_token_id", "pad_token_id")}
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**WIDE_HEADS),
    "llama-scaled-rope": lambda: LlamaConfig(**WIDE_HEADS, rope_parameters=SCALED_ROPE, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**WIDE_HEADS, tie_word_embeddings=True),
    "qwen3-moe": lambda: Qwen3MoeConfig(**WIDE_HEADS, **EXPERTS),
    "mixtral": lambda: MixtralConfig(**WIDE_HEADS, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": lambda: GPT2Config(**GPT2_SIZES, **GPT2_TOKENS, bos_token_id=None),
    "mistral": lambda: MistralConfig(**WIDE_HEADS, sliding_window=64),
    "gemma2": lambda: Gemma2Config(**WIDE_HEADS, sliding_window=64, query_pre_attn_scalar=32),
    "gemma3": lambda: Gemma3TextConfig(**WIDE_HEADS, sliding_window=64, query_pre_attn_scalar=32),
    "phi3": lambda: Phi3Config(**SIZES),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "granite": lambda: GraniteConfig(
        **SIZES, embedding_multiplier=2.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    # vLLM's window is a token longer than transformers', so nothing here is longer than the window.
    "cohere2": lambda: Cohere2Config(**WIDE_HEADS, sliding_window=CONTEXT_TOKENS),
    "smollm3": lambda: SmolLM3Config(**SIZES),
}


def write_pair(architecture: str, folder: Path) -> tuple[Path, Path]:
    """Write a student and a teacher that have other weights."""
    return write_model(architecture, folder / "student", seed=0), write_model(architecture, folder / "teacher", seed=1)


def write_model(architecture: str, folder: Path, seed: int) -> Path:
    """Write a model and the tokenizer."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train byte-level BPE on a few lines."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL[PAD], eos_token=SPECIAL[END])
    wrapped.chat_template = CHATML
    return wrapped


def write_prompts(path: Path) -> Path:
    """Write a conversation for each line."""
    prompts = [{"prompt": [{"role": "user", "content": line}]} for line in LINES * 2]
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path
