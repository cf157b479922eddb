"""What one step asked of every pool, in seconds of its workers, from the step's own batches; pure.

A busy worker says little about a rollout pool: one straggler keeps its worker busy to the end, and no further worker
would shorten it. So a step's generation is taken apart into what more workers share, and what they do not: the longest
completion by itself, and the tail in which fewer completions are written than could be.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.contracts.batches import BatchHandle, Span

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


AT_ONCE = 0.9  # share of a step's completions that, when they ran together, says that none had to wait


@dataclass(frozen=True)
class Generation:
    """A step's generation: what more workers share, and what they do not."""

    longest_seconds: float  # of the longest completion, if no other ran beside it
    crowd_seconds: float  # of all workers together: what a token costs the others that run
    full_seconds: float  # of all workers together, each as full as it can be, the crowd's seconds aside
    tail_seconds: float  # beyond what full workers take
    is_hindered: bool = False  # whether those beside it may have slowed the longest one; then it takes less by itself

    @property
    def worker_seconds(self) -> float:
        """Return what all workers together take when they are full."""
        return self.crowd_seconds + self.full_seconds

    def seconds(self, num_workers: int) -> float:
        """Return how long so many workers take."""
        alone = max(self.longest_seconds, self.full_seconds / num_workers + self.tail_seconds)
        return self.crowd_seconds / num_workers + alone

    def hoped(self, num_workers: int) -> "Generation":
        """Return the most that may be hoped for of what so many workers took: that more of them share all of it."""
        if not self.is_hindered:
            return self
        return Generation(0.0, 0.0, self.seconds(num_workers) * num_workers, 0.0, is_hindered=True)

    def times(self, by_tokens: float, by_longest: float) -> "Generation":
        """Return that of a step with so many times the tokens, and so many times the longest completion's."""
        return Generation(
            self.longest_seconds * by_longest,
            self.crowd_seconds * by_tokens,
            self.full_seconds * by_tokens,
            self.tail_seconds * by_longest,
            self.is_hindered,
        )


@dataclass(frozen=True)
class TeacherWork:
    """One teacher's part of a step."""

    busy_seconds: float  # of all replicas together
    last_seconds: float  # one batch, alone
    queued: float = 0.0  # batches at the replicas, mean over the step


@dataclass(frozen=True)
class StepWork:
    """One step."""

    seconds: float
    tokens: float  # completion tokens
    longest: float  # tokens of the longest completion
    generation: Generation
    first_share: float  # of the generation's seconds, until the first batch is at a teacher
    teachers: Mapping[str, TeacherWork]  # by pool: teachers.NAME
    learn_seconds: float
    last_learn_seconds: float  # one batch
    sync_seconds: float


@dataclass
class WorkMeter:
    """Measures steps, one after the other.

    Args:
        max_concurrent: completions that a rollout worker can write at a time, as far as one knows.
        steps_ahead: that generation runs ahead of learning.
    """

    max_concurrent: float
    steps_ahead: int
    _counted_until: dict[str, float] = field(default_factory=dict)  # of each teacher worker: steps overlap
    _pace: Pace = field(default_factory=Pace)

    def measure(
        self, record: Mapping[str, float], batches: Sequence[BatchHandle], num_rollout_workers: int
    ) -> StepWork | None:
        """Return what a step took; None when its batches do not say.

        Args:
            record: the step's figures.
            batches: what the step learned from.
            num_rollout_workers: that wrote them.
        """
        written = written_batches(batches)
        if not written:
            return None
        admitted = min(span.began for handle in batches for span in handle.spans)
        scores = [span for handle in batches for span in handle.spans if span.stage == "score"]
        lengths = np.concatenate([batch.lengths for batch in written])
        generation = self._generation(written, lengths, num_rollout_workers)
        return StepWork(
            seconds=record["step/seconds"],
            tokens=float(lengths.sum()),
            longest=float(lengths.max()),
            generation=generation,
            first_share=self._first_share(scores, admitted, written[-1].seconds),
            teachers=self._teachers(scores, record["step/seconds"]),
            learn_seconds=record["learn/seconds"],
            last_learn_seconds=record["learn/seconds"] / len(batches),
            sync_seconds=record["sync/seconds"],
        )

    @staticmethod
    def _first_share(scores: Sequence[Span], admitted: float, seconds: float) -> float:
        first = min((span.began for span in scores), default=admitted)
        return min(1.0, (first - admitted) / seconds)

    def _generation(self, written: Sequence[Written], lengths: Seconds, num_workers: int) -> Generation:
        """Take a step's generation apart.

        Where all completions ran from the start, an engine's limit is its own, or what was seen when some had to wait,
        and what the others cost each of them can be told. Elsewhere the seconds of a token are those of the least
        hindered completion; where an engine is slower when it is full, both they and the number that ran together are
        too small by the same factor, which leaves the work as it is.
        """
        ended = np.concatenate([np.full(len(batch.lengths), batch.seconds) for batch in written])
        whole, tokens = float(ended.max()), float(lengths.sum())
        token_seconds, crowding_seconds, pace = float(np.min(ended / lengths)), 0.0, None
        together = most_at_a_time(ended - lengths * token_seconds, ended)
        if together >= AT_ONCE * len(lengths) or (not self.steps_ahead and all_ran_at_once(written)):
            pace = None if self.steps_ahead else self._pace.learn(written)
            token_seconds, crowding_seconds = pace or (token_seconds, 0.0)
            full = max(len(lengths) / num_workers, self.max_concurrent)
        else:
            self.max_concurrent = full = together / num_workers
        crowd, alone = crowding_seconds * tokens, token_seconds * tokens / full
        return Generation(
            longest_seconds=token_seconds * float(lengths.max()),
            crowd_seconds=crowd,
            full_seconds=alone,
            tail_seconds=max(0.0, whole - (crowd + alone) / num_workers),
            is_hindered=pace is None,
        )

    def _teachers(self, spans: Iterable[Span], step_seconds: float) -> dict[str, TeacherWork]:
        by_pool: dict[str, list[Span]] = {}
        for span in sorted(spans, key=lambda span: span.began):
            by_pool.setdefault(f"teachers.{span.pool.removeprefix('teacher-')}", []).append(span)
        found = {}
        for pool, own in by_pool.items():
            busy = sum(self._newly_busy(span) for span in own)
            queued = sum(span.seconds for span in own) / step_seconds
            found[pool] = TeacherWork(busy, busy / len(own), queued)
        return found

    def _newly_busy(self, span: Span) -> float:
        """Return the seconds of a call in which its worker had no earlier one; calls come in their order."""
        until = self._counted_until.get(span.worker, 0.0)
        self._counted_until[span.worker] = max(until, span.ended)
        return max(0.0, span.ended - max(span.began, until))
