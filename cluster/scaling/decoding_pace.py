"""How fast rollout engines write, told from when their batches came back; pure.

A decoding step of an engine takes `token_seconds` and, for every completion that runs, `crowding_seconds`: little on a
GPU that waits for its memory, much on one that is full.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.contracts.interfaces import BatchHandle

Seconds = NDArray[np.float64]

BINS = 32  # into which a step's generation is cut to see when it was fastest
MEMORY = 0.8  # what the earlier equations weigh when another step adds its own
IN_ORDER = 0.9  # share of batches that must be longer than the one before where no completion had to wait
NEAR = 1.05  # lengths that differ less may come back in either order
SLACK = 1.3  # a batch that is not full waits for up to a quarter of the time so far
MIN_PAIRS = 3  # batches that say nothing else are too few
MIN_EQUATIONS = 3
MOST_ALIKE = 1e6  # condition number of the equations above which they all say the same


@dataclass(frozen=True)
class Written:
    """One batch of completions as it came back from its worker."""

    worker: str
    teacher: str
    lengths: Seconds  # [rows] tokens
    seconds: float  # since the step was admitted

    @property
    def longest(self) -> float:
        """Return the tokens of its longest completion."""
        return float(self.lengths.max())


def written_batches(batches: Iterable[BatchHandle]) -> list[Written]:
    """Return a step's batches in the order in which they came back."""
    calls = [(handle, span) for handle in batches for span in handle.spans if span.stage == "generate"]
    admitted = min((span.began for _, span in calls), default=0.0)
    found = [
        Written(
            span.worker,
            handle.teacher,
            np.maximum(1.0, np.array(handle.num_completion_tokens, np.float64)),
            span.ended - admitted,
        )
        for handle, span in calls
    ]
    return sorted(found, key=lambda batch: batch.seconds)


def all_ran_at_once(written: Sequence[Written]) -> bool:
    """Return whether no completion had to wait.

    Then each worker's come back from the shortest to the longest, and the seconds per token of the longest in a batch
    become fewer from one batch to the next, as fewer others run.
    """
    num_pairs = num_in_order = 0
    longest: dict[tuple[str, str], float] = {}
    fastest: dict[tuple[str, str], float] = {}  # seconds per token so far
    for batch in written:
        source, pace = (batch.worker, batch.teacher), batch.seconds / batch.longest
        if source in longest:
            num_pairs += 1
            in_order = longest[source] <= NEAR * float(batch.lengths.min())
            num_in_order += in_order and pace <= SLACK * fastest[source]
        longest[source] = batch.longest
        fastest[source] = min(pace, fastest.get(source, pace))
    return num_pairs >= MIN_PAIRS and num_in_order >= IN_ORDER * num_pairs


@dataclass
class Pace:
    """Learns the two figures of the engines from steps in which no completion had to wait.

    A completion of n tokens that began with all others of its worker came back after n token_seconds, and the
    crowding_seconds of every token that was written until then: an equation for each batch that left when it was full.
    """

    _products: Seconds = field(default_factory=lambda: np.zeros((2, 2)))
    _results: Seconds = field(default_factory=lambda: np.zeros(2))
    _num_equations: int = 0

    def learn(self, written: Sequence[Written]) -> tuple[float, float] | None:
        """Take in a step, and return token_seconds and crowding_seconds; None where they cannot be told apart."""
        rows = equations(written)
        if len(rows):
            self._products = MEMORY * self._products + rows[:, :2].T @ rows[:, :2]
            self._results = MEMORY * self._results + rows[:, :2].T @ rows[:, 2]
            self._num_equations += len(rows)
        if self._num_equations < MIN_EQUATIONS or np.linalg.cond(self._products) > MOST_ALIKE:
            return None
        token, crowding = (float(value) for value in np.linalg.solve(self._products, self._results))
        if token <= 0:
            return None
        if crowding <= 0:
            return float(self._results[0] / self._products[0, 0]), 0.0
        return token, crowding


def equations(written: Sequence[Written]) -> Seconds:
    """Return [equations, 3]: tokens of a batch's longest, tokens that its worker had written by then, seconds."""
    most_rows = max(len(batch.lengths) for batch in written)
    by_worker: dict[str, list[Written]] = {}
    for batch in written:
        by_worker.setdefault(batch.worker, []).append(batch)
    rows = []
    for own in by_worker.values():
        lengths = np.concatenate([batch.lengths for batch in own])
        for batch in own:
            if len(batch.lengths) == most_rows or batch.longest == lengths.max():
                rows.append((batch.longest, float(np.minimum(lengths, batch.longest).sum()), batch.seconds))
    return np.array(rows).reshape(-1, 3)


def most_at_a_time(began: Seconds, ended: Seconds) -> float:
    """Return how many intervals overlap in the fullest of BINS equal parts of their time, on average over that part.

    Example:
        >>> most_at_a_time(np.array([0.0, 0.0, 16.0]), np.array([32.0, 16.0, 32.0]))
        2.0
    """
    edges = np.linspace(float(began.min()), float(ended.max()), BINS + 1)
    covered = _covered(began, edges) - _covered(ended, edges)
    return float(np.max(np.diff(covered)) / (edges[1] - edges[0]))


def _covered(moments: Seconds, edges: Seconds) -> Seconds:
    """Return for each edge the seconds that lie between the moments before it and the edge, added up."""
    ordered = np.sort(moments)
    before = np.searchsorted(ordered, edges)
    total: Seconds = before * edges - np.concatenate(([0.0], np.cumsum(ordered)))[before]
    return total
