"""Holds what the studies of privileged contexts and samplers share: a task, a model of 0.1M parameters, a test.

A text is a slot for a context, a mark, and digits modulo 7, each followed by an answer: the digit plus a shift, which
a context names.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

BASE = 7  # of the digits
EMPTY, FIRST_CONTEXT, FIRST_MARK = 7, 8, 15  # tokens besides the digits 0 to 6
NUM_TOKENS = FIRST_MARK + BASE
WIDTH, HEADS, LAYERS = 64, 4, 2


class Model(nn.Module):
    """A causal transformer over whole sequences."""

    def __init__(self, vocabulary: int, text_tokens: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(text_tokens, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits, [rows, tokens, vocabulary]."""
        states = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: Tensor = self.head(self.layers(states, mask=mask, is_causal=True))
        return logits


@dataclass(frozen=True)
class Questions:
    """Holds prompts with an empty slot, and the shift that is right for each."""

    prompts: Tensor  # [rows, 2 + digits] slot, mark, digits
    shifts: Tensor  # [rows]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> "Questions":
        return Questions(self.prompts[rows], self.shifts[rows])

    @property
    def answers(self) -> Tensor:
        return (self.prompts[:, 2:] + self.shifts[:, None]) % BASE

    def with_contexts(self, shifts: Tensor) -> Tensor:
        """Return the prompts with contexts that name these shifts."""
        return torch.cat([FIRST_CONTEXT + shifts[:, None], self.prompts[:, 1:]], dim=1)

    def repeat(self, count: int) -> "Questions":
        """Return each prompt so many times, one after the other."""
        return self[torch.arange(len(self)).repeat_interleave(count)]


def draw_questions(draw: torch.Generator, count: int, num_digits: int, table: Tensor | None = None) -> Questions:
    """Draw prompts; the shift is the table's by the mark, or random."""
    marks = torch.randint(BASE, (count,), generator=draw)
    digits = torch.randint(BASE, (count, num_digits), generator=draw)
    columns = [torch.full((count, 1), EMPTY), FIRST_MARK + marks[:, None], digits]
    shifts = torch.randint(BASE, (count,), generator=draw) if table is None else table[marks]
    return Questions(torch.cat(columns, dim=1), shifts)


def text_of(prompts: Tensor, answers: Tensor) -> Tensor:
    """Return whole texts, [rows, 2 + 2 digits]; places 2, 4, ... hold the digits, and predict the answers."""
    pairs = torch.stack([prompts[:, 2:], answers], dim=2).flatten(1)
    return torch.cat([prompts[:, :2], pairs], dim=1)


@torch.no_grad()
def write(model: Model, prompts: Tensor, draw: torch.Generator | None) -> Tensor:
    """Return answers, [rows, digits]: sampled, or the likeliest tokens without a generator."""
    ids = prompts[:, :2]
    for digit in prompts[:, 2:].T:
        ids = torch.cat([ids, digit[:, None]], dim=1)
        logits = model(ids)[:, -1]
        likeliest = logits.argmax(-1, keepdim=True)
        chosen = likeliest if draw is None else torch.multinomial(logits.softmax(-1), 1, generator=draw)
        ids = torch.cat([ids, chosen], dim=1)
    return ids[:, 3::2]


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the one-sided p of an exact sign-flip test: the share of all choices of signs with as high a mean.

    Example:
        >>> sign_flip_p([0.1, 0.2, 0.3, 0.1, 0.2])
        0.03125
    """
    signs = list(itertools.product((1, -1), repeat=len(differences)))
    flipped = [sum(sign * value for sign, value in zip(one, differences, strict=True)) for one in signs]
    return mean(total >= sum(differences) - 1e-12 for total in flipped)


def read_outcomes(log: Path) -> list[dict[str, Any]]:
    """Return the outcomes so far."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
