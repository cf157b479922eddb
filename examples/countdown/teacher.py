"""The teacher: right at once, and able to go on from anybody's mistakes.

Its own transcripts hold no failed try, but the student's do. So wrong tries stand in its training prefixes; it learns
what to write after them (the sum, the miss mark, the right pair), never to write them.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from examples.countdown.pretraining import Phase, Shape
from examples.countdown.task import (
    LARGEST_NUMBER,
    TOKENS_PER_TRY,
    Bools,
    Ints,
    Problems,
    Transcripts,
    Tries,
    draw_problems,
    write_transcripts,
)

SHAPE = Shape(hidden_size=160, num_layers=4, intermediate_size=448)
BATCH_SIZE = 128
FALSE_SUM_RATE = 0.1  # of the wrong tries


def phases() -> list[Phase]:
    """Return the teacher's training; short lists give it the first foothold."""
    short = partial(draw_batch, list_lengths=(4, 5, 6, 6), most_wrong_tries=(0, 2, 4, 7))
    full = partial(draw_batch, list_lengths=(6,), most_wrong_tries=(0, 0, 2, 7))
    return [
        Phase(1_100, short),
        Phase(800, full),
        Phase(400, full),
        Phase(600, full, matrix_lr=0.01, other_lr=1.5e-3, decay_fraction=1.0),
    ]


def draw_batch(
    rng: np.random.Generator, list_lengths: tuple[int, ...], most_wrong_tries: tuple[int, ...]
) -> Transcripts:
    """Draw transcripts with wrong tries that are read but not learned, then the right try.

    The list length and the largest number of wrong tries are drawn once per batch. Seven wrong tries and the right one
    fill the demo's longest completion.
    """
    problems = draw_problems(rng, BATCH_SIZE, int(rng.choice(list_lengths)))
    most_wrong = int(rng.choice(most_wrong_tries))
    num_wrong = rng.integers(0, most_wrong, size=BATCH_SIZE, endpoint=True)
    firsts, seconds = _wrong_pairs(rng, problems, most_wrong + 1)
    rows = np.arange(BATCH_SIZE)
    right_pair = rng.permuted(problems.pair, axis=1)
    firsts[rows, num_wrong], seconds[rows, num_wrong] = right_pair.T

    is_wrong = np.arange(most_wrong + 1) < num_wrong[:, None]  # [problems, tries]
    sums, is_false = _sums(rng, problems, firsts, seconds, is_wrong)
    is_learned = np.ones((*firsts.shape, TOKENS_PER_TRY), dtype=bool)
    is_learned[is_wrong, :4] = False
    is_learned[is_false, 4] = False
    tries = Tries(firsts, seconds, sums, num_wrong + 1, np.ones(BATCH_SIZE, dtype=bool))
    return write_transcripts(problems, tries, is_learned)


def _wrong_pairs(rng: np.random.Generator, problems: Problems, num_tries: int) -> tuple[Ints, Ints]:
    """Draw two different list positions per try that are not the right pair."""
    length = problems.numbers.shape[1]
    size = (len(problems), num_tries)
    firsts = rng.integers(0, length, size=size)
    seconds = (firsts + rng.integers(1, length, size=size)) % length
    for _ in range(2):  # the next position may be the first number's own; the one after it is free
        is_right = (np.sort(problems.pair, axis=1) == np.sort(np.stack([firsts, seconds]), axis=0).T).all(axis=2).T
        seconds = np.where(is_right | (firsts == seconds), (seconds + 1) % length, seconds)
    return firsts, seconds


def _sums(
    rng: np.random.Generator, problems: Problems, firsts: Ints, seconds: Ints, is_wrong: Bools
) -> tuple[Ints, Bools]:
    """Return the printed sums and which of them are false; only wrong tries carry false ones."""
    pick = np.take_along_axis
    sums = pick(problems.numbers, firsts, axis=1) + pick(problems.numbers, seconds, axis=1)
    is_false = is_wrong & (rng.random(sums.shape) < FALSE_SUM_RATE)
    return np.where(is_false, rng.integers(1, 2 * LARGEST_NUMBER, size=sums.shape), sums), is_false
