"""The student before distillation: it can add, half knows how to find the pair, picks carelessly and gives up early.

It has seen synthetic transcripts only and nothing of the teacher's. Three phases teach it the skills from mostly
careful transcripts; the last one makes it careless: it then mostly picks the first number at random, takes the partner
of that number when there is one, writes the true sum, marks a miss, and after a miss nearly always stops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from examples.countdown.pretraining import Phase, Shape
from examples.countdown.task import Transcripts, Tries, draw_problems, write_transcripts

SHAPE = Shape(hidden_size=96, num_layers=3, intermediate_size=256)
BATCH_SIZE = 96


@dataclass(frozen=True)
class Manner:
    """How a synthetic transcript is written."""

    list_lengths: tuple[int, ...]  # one is drawn per batch
    care: float  # share of transcripts whose first number is surely one of the pair; others pick it at random
    retry_rate: float  # share of misses after which another try follows


def phases() -> list[Phase]:
    """Return the student's training."""
    careful_short = Manner(list_lengths=(4, 5, 6), care=0.8, retry_rate=0.3)
    careful = Manner(list_lengths=(6,), care=0.8, retry_rate=0.3)
    careless = Manner(list_lengths=(6,), care=0.3, retry_rate=0.03)
    return [
        Phase(1_600, partial(draw_batch, manner=careful_short)),
        Phase(1_200, partial(draw_batch, manner=careful)),
        Phase(1_200, partial(draw_batch, manner=careful)),
        Phase(150, partial(draw_batch, manner=careless), matrix_lr=0.01, other_lr=1.5e-3),
    ]


def draw_batch(rng: np.random.Generator, manner: Manner) -> Transcripts:
    """Draw transcripts in one manner."""
    problems = draw_problems(rng, BATCH_SIZE, int(rng.choice(manner.list_lengths)))
    length = problems.numbers.shape[1]
    rows = np.arange(BATCH_SIZE)[:, None]

    # No first number is tried twice, so one of the pair comes up within list - 1 tries.
    order = rng.random((BATCH_SIZE, length))
    order[rows, problems.pair] -= rng.random((BATCH_SIZE, 1)) < manner.care
    firsts = order.argsort(axis=1)[:, : length - 1]
    seconds = (firsts + rng.integers(1, length, size=firsts.shape)) % length
    left, right = problems.pair[:, :1], problems.pair[:, 1:]
    seconds = np.where(firsts == left, right, np.where(firsts == right, left, seconds))
    sums = problems.numbers[rows, firsts] + problems.numbers[rows, seconds]

    misses = (sums != problems.targets[:, None]).cumprod(axis=1).sum(axis=1)
    patience = rng.geometric(1 - manner.retry_rate, size=BATCH_SIZE) - 1  # retries before giving up
    num_tries = np.minimum(misses, patience) + 1
    return write_transcripts(problems, Tries(firsts, seconds, sums, num_tries, misses <= patience))
