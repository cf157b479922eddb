"""Two-number Countdown with retries: problems, transcripts, vocabulary and tokenizer.

A problem is a target and a list of distinct numbers of which exactly one pair sums to the target. A completion is a
sequence of tries `a + b = c`; a miss is marked `x`, and the last try counts:

    28 : 21 14 4 22 19 6 |   ->   21 + 6 = 27 x 22 + 6 = 28
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = 0, 1, 2, 3
FIRST_NUMBER = 4  # the number n is token n + 4
NUM_NUMBERS = 100
PLUS, EQUALS, MISS, COLON, BAR = range(FIRST_NUMBER + NUM_NUMBERS, FIRST_NUMBER + NUM_NUMBERS + 5)
VOCABULARY_SIZE = 112  # 109 used; rounded up to a multiple of 16
TOKENS_PER_TRY = 6  # a + b = c, then the miss mark or the end

LARGEST_NUMBER = 30
LIST_LENGTH = 6
HELD_OUT_BUCKETS = 20  # one bucket in this many is never trained on

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Problems:
    """A batch of problems with lists of one length."""

    targets: Ints  # [problems]
    numbers: Ints  # [problems, list]
    pair: Ints  # [problems, 2]  list positions of the two numbers that sum to the target

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Ints | Bools | slice) -> Problems:
        """Return the chosen rows."""
        return Problems(self.targets[rows], self.numbers[rows], self.pair[rows])


@dataclass(frozen=True)
class Tries:
    """What is tried on each problem, as list positions and printed sums; tries past `num_tries` are not written."""

    firsts: Ints  # [problems, tries]  list positions
    seconds: Ints  # [problems, tries]  list positions
    sums: Ints  # [problems, tries]  the sum as printed
    num_tries: Ints  # [problems]
    is_solved: Bools  # [problems]  the last try is followed by the end, not by the miss mark


@dataclass(frozen=True)
class Transcripts:
    """Prompts with completions, ready for next-token training."""

    token_ids: Ints  # [problems, tokens]  padded on the right
    loss_mask: Bools  # [problems, tokens]  True where the token is to be learned


def draw_problems(
    rng: np.random.Generator, count: int, list_length: int = LIST_LENGTH, held_out: bool = False
) -> Problems:
    """Draw `count` problems from the training part of the problem space, or from the held-out part."""
    batches: list[Problems] = []
    while sum(map(len, batches)) < count:
        candidates = _draw_candidates(rng, 2 * count, list_length)
        batches.append(candidates.take(_has_one_answer(candidates) & (is_held_out(candidates) == held_out)))
    return Problems(
        np.concatenate([batch.targets for batch in batches])[:count],
        np.concatenate([batch.numbers for batch in batches])[:count],
        np.concatenate([batch.pair for batch in batches])[:count],
    )


def is_held_out(problems: Problems) -> Bools:
    """Say which problems belong to the held-out part; the order of the list plays no role."""
    fingerprint = problems.targets.copy()
    for column in np.sort(problems.numbers, axis=1).T:
        fingerprint = (fingerprint * 31 + column) % 1_000_003
    return fingerprint % HELD_OUT_BUCKETS == 0


def prompt_texts(problems: Problems) -> Iterator[str]:
    """Yield `28 : 21 14 4 22 19 6 |` for each problem."""
    for target, numbers in zip(problems.targets, problems.numbers, strict=True):
        yield f"{target} : {' '.join(map(str, numbers))} |"


def answer_patterns(problems: Problems) -> Iterator[str]:
    """Yield, for each problem, a regular expression that matches a whole completion whose last try is right."""
    pairs = np.take_along_axis(problems.numbers, problems.pair, axis=1)
    for target, (first, second) in zip(problems.targets, pairs, strict=True):
        yield rf"(?:.* x )?(?:{first} \+ {second}|{second} \+ {first}) = {target}"


def prompt_ids(problems: Problems) -> Ints:  # [problems, list + 4]
    """Tokenize the prompts: begin, target, colon, list, bar."""

    def column(token: int) -> Ints:
        return np.full((len(problems), 1), token)

    targets = problems.targets[:, None] + FIRST_NUMBER
    return np.hstack([column(BOS), targets, column(COLON), problems.numbers + FIRST_NUMBER, column(BAR)])


def write_transcripts(problems: Problems, tries: Tries, is_learned: Bools | None = None) -> Transcripts:
    """Write the tries out as tokens.

    `is_learned` [problems, tries, TOKENS_PER_TRY] clears the loss mask of single tokens of a try.
    """
    prompts = prompt_ids(problems)
    body = _try_tokens(problems, tries)  # [problems, tries, TOKENS_PER_TRY]
    learned = np.ones(body.shape, dtype=bool) if is_learned is None else is_learned
    is_written = np.arange(body.shape[1])[None, :, None] < tries.num_tries[:, None, None]
    tokens = np.where(is_written, body, PAD).reshape(len(problems), -1)
    mask = (is_written & learned).reshape(len(problems), -1)

    completions = np.pad(tokens, ((0, 0), (0, 1)))
    completion_mask = np.pad(mask, ((0, 0), (0, 1)))
    rows = np.arange(len(problems))
    end = TOKENS_PER_TRY * tries.num_tries - tries.is_solved
    completions[rows, end] = EOS
    completion_mask[rows, end] = True

    width = int(end.max()) + 1
    token_ids = np.hstack([prompts, completions[:, :width]])
    loss_mask = np.hstack([np.zeros(prompts.shape, dtype=bool), completion_mask[:, :width]])
    return Transcripts(token_ids, loss_mask)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per number and symbol, a begin token added by itself, words joined by spaces."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *map(str, range(NUM_NUMBERS)), "+", "=", "x", ":", "|"]
    words += [f"<reserved_{index}>" for index in range(VOCABULARY_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _draw_candidates(rng: np.random.Generator, count: int, list_length: int) -> Problems:
    numbers = rng.random((count, LARGEST_NUMBER)).argsort(axis=1)[:, :list_length] + 1
    pair = rng.random((count, list_length)).argsort(axis=1)[:, :2]
    targets = np.take_along_axis(numbers, pair, axis=1).sum(axis=1)
    return Problems(targets, numbers, pair)


def _has_one_answer(problems: Problems) -> Bools:
    sums = problems.numbers[:, :, None] + problems.numbers[:, None, :]
    first, second = np.triu_indices(problems.numbers.shape[1], k=1)
    return (sums[:, first, second] == problems.targets[:, None]).sum(axis=1) == 1


def _try_tokens(problems: Problems, tries: Tries) -> Ints:
    tokens = np.empty((*tries.firsts.shape, TOKENS_PER_TRY), dtype=np.int64)
    tokens[..., 0] = np.take_along_axis(problems.numbers, tries.firsts, axis=1) + FIRST_NUMBER
    tokens[..., 1] = PLUS
    tokens[..., 2] = np.take_along_axis(problems.numbers, tries.seconds, axis=1) + FIRST_NUMBER
    tokens[..., 3] = EQUALS
    tokens[..., 4] = tries.sums + FIRST_NUMBER
    tokens[..., 5] = MISS
    return tokens
