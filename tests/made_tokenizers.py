"""Trains small tokenizers of both families on a text, without files."""

import json
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
TEXT = (
    "the quick brown fox jumps over the lazy dog 12 + 30 = 42\r\n",
    " \u05e9\u05dc\u05d5\u05dd \u4f60\u597d caf\u00e9 na\u00efve \U0001f600 <think> yes </think>",
)


def byte_level(
    num_merges: int, text: Sequence[str] = TEXT, special: Sequence[str] = SPECIAL, splits: bool = True
) -> PreTrainedTokenizerFast:
    """Train a tokenizer in GPT-2's manner; `splits`: at words and numbers, as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(special) + len(alphabet) + num_merges
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=sorted(alphabet), special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(list(text), trainer)
    return wrap(tokenizer, special)


def sentencepiece(
    num_merges: int, text: Sequence[str] = TEXT, special: Sequence[str] = SPECIAL, prefix: bool = True
) -> PreTrainedTokenizerFast:
    """Train a tokenizer in Llama 2's manner: a space before every text with `prefix`, and bytes as a last resort."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), *spaces] if prefix else spaces)
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 60 + num_merges, special_tokens=list(special), limit_alphabet=60, show_progress=False
    )
    trained.train_from_iterator(list(text), trainer)
    described = json.loads(trained.to_str())
    model = described["model"]
    ordinary = [token for token in model["vocab"] if token not in special]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *ordinary]
    model["vocab"] = {token: token_id for token_id, token in enumerate(names)}
    model["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrap(tokenizer, special)


def permuted(tokenizer: PreTrainedTokenizerFast, order: Sequence[int]) -> PreTrainedTokenizerFast:
    """Return the same tokens under other ids: token i of the tokenizer is `order[i]`."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    model["vocab"] = {token: int(order[token_id]) for token, token_id in model["vocab"].items()}
    for added in described["added_tokens"]:
        added["id"] = int(order[added["id"]])
    described["added_tokens"].sort(key=lambda added: added["id"])
    return wrap(Tokenizer.from_str(json.dumps(described)), SPECIAL)


def wrap(tokenizer: Tokenizer, special: Sequence[str]) -> PreTrainedTokenizerFast:
    names = {name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    present = {name: token for name, token in names.items() if token in special}
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **present)
