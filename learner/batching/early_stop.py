"""Ends trajectories where their teacher has said for a while what the sampler says: little is learned from there on.

A trajectory ends after the first token at which the mean |sampler - teacher log-probability| of the last `window`
tokens is below a bound. Whether a token counts depends on those before it alone, so each position's gradient keeps its
expectation; what comes after the end has no loss, and the student does not read it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config.terms import TEACHER
from learner.batching.micro_batch import Trajectory, only


def num_taught(log_ratios: NDArray[Any], window: int, below: float) -> int:
    """Return how many tokens come before the end.

    Example:
        >>> num_taught(np.array([1.0, 0.2, 0.0, 0.1, 0.0, 3.0]), window=2, below=0.15)
        3
    """
    sums = np.cumsum(np.concatenate([[0.0], np.abs(log_ratios).astype(np.float64)]))
    is_below = sums[window:] - sums[:-window] < below * window
    return int(np.argmax(is_below)) + window if is_below.any() else len(log_ratios)


def end_early(rows: Sequence[Trajectory], window: int, below: float) -> list[Trajectory]:
    """Return the trajectories without what comes after their ends; rows that go on to their last token as they are."""
    return [_end(row, num_taught(_log_ratios(row), window, below)) for row in rows]


def _log_ratios(row: Trajectory) -> NDArray[Any]:
    return np.asarray(row.rollout_logprobs - row.scores[TEACHER]["logprobs"])


def _end(row: Trajectory, count: int) -> Trajectory:
    num_tokens = len(row.rollout_logprobs)
    if count >= num_tokens:
        return row
    ended = only(row, np.arange(num_tokens) < count)
    length = int(np.flatnonzero(ended.loss_mask)[-1]) + 1
    sampled = np.zeros(row.num_sampled, bool)
    sampled[row.positions[:count]] = True
    return replace(ended, token_ids=ended.token_ids[:length], loss_mask=ended.loss_mask[:length], strict=sampled)
