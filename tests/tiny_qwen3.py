"""A random Qwen3 of a few thousand parameters as a Hugging Face directory, and what it should say, by transformers."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

EOS, HALT, NUM_WORDS = 1, 3, 112
CONTEXT_TOKENS = 512
TEACHER_TOP_K = 8


def write_tiny_qwen3(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer; word 3 is `halt`, all others are `w` and their id."""
    words = ["<pad>", "<eos>", "<unk>", "halt", *(f"w{index}" for index in range(4, NUM_WORDS))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=NUM_WORDS,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT_TOKENS,
        eos_token_id=EOS,
        bos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """Load the model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def expected_logprobs(model: PreTrainedModel, token_ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Return [tokens - 1, vocabulary]: row t is the distribution of token t + 1."""
    logits = model(torch.tensor([token_ids])).logits[0, :-1].float()
    return torch.log_softmax(logits / temperature, dim=-1)
