"""A cache of the Hugging Face hub that holds the Qwen3 family without weights: published shapes, a small tokenizer.

The tokenizer has the special tokens of Qwen3, one token per byte besides, and a ChatML template with the branch that
switches thinking off.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

# hidden width, layers, heads, width of the feed-forward layers, whether embedding and head are one
SHAPES = {
    "Qwen3-0.6B": (1024, 28, 16, 3072, True),
    "Qwen3-1.7B": (2048, 28, 16, 6144, True),
    "Qwen3-1.7B-Base": (2048, 28, 16, 6144, True),
    "Qwen3-4B": (2560, 36, 32, 9728, True),
    "Qwen3-8B": (4096, 36, 32, 12288, False),
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
COMMIT = "0" * 40


def write_hub(folder: Path) -> Path:
    """Write the cache, which is $HF_HOME/hub for those who set HF_HUB_OFFLINE=1, and return its folder."""
    for name, (hidden, layers, heads, intermediate, is_tied) in SHAPES.items():
        model = folder / f"models--Qwen--{name}"
        snapshot = model / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (model / "refs").mkdir()
        (model / "refs/main").write_text(COMMIT)
        eos = SPECIAL_TOKENS[0] if name.endswith("Base") else SPECIAL_TOKENS[2]
        tokenizer = _tokenizer(eos)
        tokenizer.save_pretrained(snapshot)
        ends = [tokenizer.convert_tokens_to_ids(token) for token in {eos, SPECIAL_TOKENS[0]}]
        GenerationConfig(eos_token_id=ends, do_sample=True).save_pretrained(snapshot)
        config = Qwen3Config(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=32_768 if name.endswith("Base") else 40_960,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
            tie_word_embeddings=is_tied,
            eos_token_id=tokenizer.eos_token_id,
            architectures=["Qwen3ForCausalLM"],
            dtype="bfloat16",
        )
        config.save_pretrained(snapshot)
    return folder


def _tokenizer(eos: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=SPECIAL_TOKENS[0], chat_template=TEMPLATE
    )
