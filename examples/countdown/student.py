"""The student before distillation: it adds well, picks carelessly and gives up after a miss.

It has seen only synthetic, careless transcripts and nothing of the teacher's. It picks the first number with a weak
preference for the right ones, sees the partner of that number when there is one, writes the true sum and marks a
miss; after a miss it nearly always stops.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from examples.countdown.pretraining import Phase, Shape
from examples.countdown.task import Transcripts, Tries, draw_problems, write_transcripts

SHAPE = Shape(hidden_size=96, num_layers=3, intermediate_size=256)
BATCH_SIZE = 96
CARE = 0.25  # share of transcripts that prefer the right numbers


def phases() -> list[Phase]:
    """Return the student's training: short lists, then full lists, then giving up."""
    return [
        Phase(1_000, partial(draw_batch, list_lengths=(4, 5, 6), retry_rate=0.4)),
        Phase(1_000, partial(draw_batch, list_lengths=(6,), retry_rate=0.3)),
        Phase(120, partial(draw_batch, list_lengths=(6,), retry_rate=0.02)),
    ]


def draw_batch(rng: np.random.Generator, list_lengths: tuple[int, ...], retry_rate: float) -> Transcripts:
    """Draw careless transcripts; after each miss another try follows with probability `retry_rate`."""
    problems = draw_problems(rng, BATCH_SIZE, int(rng.choice(list_lengths)))
    length = problems.numbers.shape[1]
    rows = np.arange(BATCH_SIZE)[:, None]

    # No first number is tried twice, so one of the pair comes up within list - 1 tries.
    order = rng.random((BATCH_SIZE, length))
    order[rows, problems.pair] -= rng.random((BATCH_SIZE, 1)) < CARE
    firsts = order.argsort(axis=1)[:, : length - 1]
    seconds = (firsts + rng.integers(1, length, size=firsts.shape)) % length
    left, right = problems.pair[:, :1], problems.pair[:, 1:]
    seconds = np.where(firsts == left, right, np.where(firsts == right, left, seconds))
    sums = problems.numbers[rows, firsts] + problems.numbers[rows, seconds]

    misses = (sums != problems.targets[:, None]).cumprod(axis=1).sum(axis=1)
    patience = rng.geometric(1 - retry_rate, size=BATCH_SIZE) - 1  # retries before giving up
    num_tries = np.minimum(misses, patience) + 1
    return write_transcripts(problems, Tries(firsts, seconds, sums, num_tries, misses <= patience))
