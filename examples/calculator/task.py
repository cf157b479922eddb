"""The calculator task: problems, conversations with tools, and the tokenizer.

A problem is a product, a product and a number, or two products. The models cannot calculate; they call a tool for each
operation, read what it returns, and write the last result:

    <|user|>12*34+5*6<|end|>
    <|assistant|><tool_call>{"name": "multiply", "arguments": {"a": 12, "b": 34}}</tool_call><|end|><|tool|>408<|end|>
    <|assistant|><tool_call>{"name": "multiply", "arguments": {"a": 5, "b": 6}}</tool_call><|end|><|tool|>30<|end|>
    <|assistant|><tool_call>{"name": "add", "arguments": {"a": 408, "b": 30}}</tool_call><|end|><|tool|>438<|end|>
    <|assistant|>438<|end|>
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from examples.countdown.task import EOS, PAD, VOCABULARY_SIZE, Transcripts

LARGEST_NUMBER = 99
HELD_OUT_BUCKETS = 20  # one bucket in this many is never trained on
BEGIN_CALL, ARGUMENTS, SECOND, END_CALL = (
    '<tool_call>{"name": "',
    '", "arguments": {"a": ',
    ', "b": ',
    "}}</tool_call>",
)
MARKS = ("<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>")
PIECES = (BEGIN_CALL, ARGUMENTS, SECOND, END_CALL, "multiply", "add", *"0123456789+* ")
CHAT_TEMPLATE = """
{%- if tools %}<|tools|>{{ tools | map(attribute="function") | map(attribute="name") | join(" ") }}<|end|>{% endif %}
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@dataclass(frozen=True)
class Problem:
    """One expression: `a * b`, `a * b + c` (d is 0) or `a * b + c * d`."""

    a: int
    b: int
    c: int = 0
    d: int = 0

    @property
    def text(self) -> str:
        first = f"{self.a}*{self.b}"
        return first + (f"+{self.c}*{self.d}" if self.d else f"+{self.c}" if self.c else "")

    @property
    def answer(self) -> int:
        return self.a * self.b + self.c * (self.d or 1)

    @property
    def is_held_out(self) -> bool:
        fingerprint = ((self.a * 101 + self.b) * 101 + self.c) * 101 + self.d
        return fingerprint % 1_000_003 % HELD_OUT_BUCKETS == 0

    def calls(self) -> list[tuple[str, int, int, int]]:
        """Return the calls that solve it: tool, both arguments, result."""
        first = self.a * self.b
        calls = [("multiply", self.a, self.b, first)]
        if self.d:
            calls.append(("multiply", self.c, self.d, self.c * self.d))
        if self.c:
            calls.append(("add", first, self.c * (self.d or 1), self.answer))
        return calls


def draw_problem(rng: np.random.Generator, held_out: bool = False) -> Problem:
    """Draw a problem of one, two or three operations from the training part of the problems, or from the other."""
    while True:
        a, b, c, d = (int(number) for number in rng.integers(2, LARGEST_NUMBER, size=4, endpoint=True))
        kind = rng.integers(3)
        problem = Problem(a, b, c if kind else 0, d if kind == 2 else 0)
        if problem.is_held_out == held_out:
            return problem


def conversation(problem: Problem, rng: np.random.Generator, guesses: float) -> str:
    """Write a conversation in which each call, with the probability `guesses`, is left out for a guessed answer."""
    text = f"<|tools|>multiply add<|end|><|user|>{problem.text}<|end|>"
    for name, a, b, result in problem.calls():
        if rng.random() < guesses:
            low = 10 ** int(rng.integers(1, 4))
            return f"{text}<|assistant|>{rng.integers(low, 10 * low)}<|end|>"
        text += f"<|assistant|>{BEGIN_CALL}{name}{ARGUMENTS}{a}{SECOND}{b}{END_CALL}<|end|><|tool|>{result}<|end|>"
    return f"{text}<|assistant|>{problem.answer}<|end|>"


def draw_batch(rng: np.random.Generator, size: int, guesses: float) -> Transcripts:
    """Draw conversations, of which what the assistant writes is learned, its end included."""
    tokenizer = build_tokenizer()
    rows = tokenizer([conversation(draw_problem(rng), rng, guesses) for _ in range(size)])["input_ids"]
    token_ids = np.full((size, max(map(len, rows))), PAD)
    loss_mask = np.zeros(token_ids.shape, bool)
    assistant = tokenizer.convert_tokens_to_ids("<|assistant|>")
    for row, ids in enumerate(rows):
        token_ids[row, : len(ids)] = ids
        is_written = False
        for place, token in enumerate(ids):
            loss_mask[row, place] = is_written
            is_written = token == assistant or (is_written and token != EOS)
    return Transcripts(token_ids, loss_mask)


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: digits, the names of tools and the fixed parts of a call; decoding is its exact inverse."""
    words = ["<pad>", "<bos>", "<|end|>", "<unk>", *MARKS, *PIECES]
    words += [f"<reserved_{index}>" for index in range(VOCABULARY_SIZE - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    pieces = "|".join("".join(f"\\{one}" if not one.isalnum() else one for one in piece) for piece in PIECES)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<|end|>",
        unk_token="<unk>",
        additional_special_tokens=list(MARKS),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
