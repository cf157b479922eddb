"""Give the embedded models BPE tokenizers: a pair of one tokenizer, and a teacher of another.

python -m examples.countdown.other_tokenizers --out FOLDER

Both are trained on the same transcripts. `bpe` is byte-level, in GPT-2's manner, and merges every number; the embedded
student and teacher take it over with their weights, for each of its tokens is one of theirs. `pieces` is in the manner
of SentencePiece and stops merging earlier, so that sums above 40 are spelled in two tokens; a teacher with it starts
from the embedded one and is trained for a few minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.countdown import teacher
from examples.countdown.pretraining import Phase, train
from examples.countdown.task import (
    BOS,
    EOS,
    PAD,
    VOCABULARY_SIZE,
    Bools,
    Ints,
    Transcripts,
    build_tokenizer,
)

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
NUM_TRANSCRIPTS = 64  # batches of them that the tokenizers are trained on
BPE_MERGES = 75  # a space before each symbol and digit, then all numbers from 10 to 59
PIECES_MERGES = 45  # all numbers of the lists, to 30, and sums to 40; higher ones are spelled in two tokens
PHASES = ((120, 2e-3, 0.8), (150, 1e-3, 1.0))  # steps, learning rate of the embedding, share of them in which it falls
BATCH_SIZE = 32
RESERVED = VOCABULARY_SIZE - 1  # an embedded token that stands in no text, and has the least probability

logger = logging.getLogger(__name__)


def main() -> None:
    """Write `student`, `teacher` and `other_teacher` into a folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--embedded", type=Path, default=Path("cluster/embedded"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write_models(arguments.out, arguments.embedded, arguments.seed)


def write_models(out: Path, embedded: Path, seed: int = 0) -> None:
    """Train both tokenizers and the teacher of the other one."""
    texts = transcript_texts(np.random.default_rng(seed))
    bpe, pieces = bpe_tokenizer(texts), pieces_tokenizer(texts)
    for name in ("student", "teacher"):
        save(with_tokenizer(_read(embedded / name), bpe), bpe, out / name)
    other = with_tokenizer(_read(embedded / "teacher"), pieces, learns_digits=True)
    draw = partial(draw_batch, spelled=spelled_words(pieces))
    for steps, learning_rate, decay in PHASES:
        phase = Phase(steps, draw, 0.004, learning_rate, warmup_steps=10, decay_fraction=decay)
        train(other, phase, np.random.default_rng([seed, steps]))
        save(other, pieces, out / "other_teacher")


def write_untrained(out: Path, embedded: Path, seed: int = 0) -> None:
    """Write the pair with two tokenizers that both merge every number, which needs no training."""
    texts = transcript_texts(np.random.default_rng(seed))
    bpe, pieces = bpe_tokenizer(texts), pieces_tokenizer(texts, BPE_MERGES)
    save(with_tokenizer(_read(embedded / "student"), bpe), bpe, out / "student")
    save(with_tokenizer(_read(embedded / "teacher"), pieces), pieces, out / "teacher")


def transcript_texts(rng: np.random.Generator) -> list[str]:
    """Draw transcripts of the teacher's training as texts."""
    words = build_tokenizer()
    batches = [
        teacher.draw_batch(rng, list_lengths=(6,), most_wrong_tries=(0, 0, 2, 7)) for _ in range(NUM_TRANSCRIPTS)
    ]
    rows = [row.tolist() for batch in batches for row in batch.token_ids]
    return words.batch_decode(rows, skip_special_tokens=True)


def bpe_tokenizer(texts: list[str], merges: int = BPE_MERGES) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer; every text begins with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + len(alphabet) + merges,
        initial_alphabet=sorted(alphabet),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrapped(tokenizer)


def pieces_tokenizer(texts: list[str], merges: int = PIECES_MERGES) -> PreTrainedTokenizerFast:
    """Train a tokenizer in the manner of SentencePiece: "▁" for a space, and byte tokens for what it lacks."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    letters = {letter for text in texts for letter in text.replace(" ", "▁")}
    size = len(SPECIAL) + len(letters) + merges
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    )
    described = json.loads(trained.to_str())
    ordinary = [token for token in described["model"]["vocab"] if token not in SPECIAL]
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *ordinary]
    described["model"] |= {"vocab": {token: index for index, token in enumerate(tokens)}, "byte_fallback": True}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(tokenizer)


def with_tokenizer(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, learns_digits: bool = False
) -> Qwen3ForCausalLM:
    """Return the model with an embedding for each of the tokenizer's tokens, which is that of the same word.

    A digit without a space, which no word is, begins as half of its number if the model `learns_digits`: equal ones
    would stay equal for long.
    """
    words = build_tokenizer().get_vocab()
    size = -(-len(tokenizer) // 16) * 16
    spelled = [tokenizer.decode([token_id]).strip() for token_id in range(len(tokenizer))]
    starts_word = [token.startswith(("Ġ", "▁")) or token in SPECIAL for token in _tokens(tokenizer)]
    rows = [
        words.get(word, RESERVED) if starts else RESERVED for word, starts in zip(spelled, starts_word, strict=True)
    ]
    rows[: len(SPECIAL)] = [PAD, BOS, EOS, words["<unk>"]]
    halves = [words.get(word, RESERVED) for word in spelled]
    old = model.get_input_embeddings().weight.detach()
    new = old[torch.tensor([*rows, *[RESERVED] * (size - len(rows))])].clone()
    is_digit = torch.tensor([word.isdigit() and not starts for word, starts in zip(spelled, starts_word, strict=True)])
    new[: len(rows)][is_digit] = (new[: len(rows)] + old[torch.tensor(halves)])[is_digit] / 2
    model.resize_token_embeddings(size)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new)
    return model


def spelled_words(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Return the tokens of each embedded token's word behind a space."""
    words = {index: word for word, index in build_tokenizer().get_vocab().items()}
    special = {PAD: [PAD], BOS: [BOS], EOS: [EOS]}
    encode = partial(tokenizer.encode, add_special_tokens=False)
    return [special.get(index) or encode(words[index]) for index in range(VOCABULARY_SIZE)]


def draw_batch(rng: np.random.Generator, spelled: list[list[int]]) -> Transcripts:
    """Draw what the embedded teacher was trained on, in other tokens."""
    batch = teacher.draw_batch(rng, list_lengths=(6,), most_wrong_tries=(0, 0, 2, 7))
    rows, masks = [], []
    for token_ids, loss_mask in zip(batch.token_ids[:BATCH_SIZE], batch.loss_mask[:BATCH_SIZE], strict=True):
        parts = [spelled[token_id] for token_id in token_ids]
        rows.append(np.concatenate(parts))
        masks.append(np.repeat(loss_mask, [len(part) for part in parts]))
    return Transcripts(_padded(rows, PAD), _padded(masks, False))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the model in bf16 with its tokenizer; the model takes on the rounding."""
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(directory)
    model.to(torch.float32)
    tokenizer.save_pretrained(directory)


def _read(folder: Path) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _padded(rows: list[np.ndarray], value: int | bool) -> Ints | Bools:
    width = max(map(len, rows))
    return np.stack([np.pad(row, (0, width - len(row)), constant_values=value) for row in rows])


def _tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    main()
