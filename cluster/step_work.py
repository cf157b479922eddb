"""What one step asked of every pool, in seconds of its workers, from the step's own batches; pure.

A busy worker says little about a rollout pool: one straggler keeps its worker busy to the end, and no further worker
would shorten it. So a step's generation is taken apart into what more workers share, `rollout_seconds`, and what they
do not: the longest completion by itself, and the tail in which fewer completions are written than could be.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.observation import Span

Seconds = NDArray[np.float64]

BINS = 32  # into which a step's generation is cut to see when it was fastest
AT_ONCE = 0.9  # share of a step's completions that, when they ran together, says that none had to wait


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
    longest_seconds: float  # which it takes however many workers there are
    rollout_seconds: float  # of all rollout workers together, each as full as it was at its fullest
    tail_seconds: float  # of generation beyond what full workers take
    first_seconds: float  # from the step's admission to its first batch at a teacher
    teachers: Mapping[str, TeacherWork]  # by pool: teachers.NAME
    learn_seconds: float
    last_learn_seconds: float  # one batch
    sync_seconds: float


@dataclass
class WorkMeter:
    """Measures steps, one after the other.

    Args:
        max_concurrent: completions that a rollout worker can write at a time, as far as one knows.
    """

    max_concurrent: float
    _counted_until: dict[str, float] = field(default_factory=dict)  # of each teacher worker: steps overlap

    def measure(
        self, record: Mapping[str, float], batches: Sequence[BatchHandle], num_rollout_workers: int
    ) -> StepWork | None:
        """Return what a step took; None when its batches do not say.

        Args:
            record: the step's figures.
            batches: what the step learned from.
            num_rollout_workers: that wrote them.
        """
        written = [(handle, span) for handle in batches for span in handle.spans if span.stage == "generate"]
        scores = [span for handle in batches for span in handle.spans if span.stage == "score"]
        if not written:
            return None
        admitted = min(span.began for _, span in written)
        lengths = np.array([length for handle, _ in written for length in handle.num_completion_tokens], np.float64)
        ended = np.array([span.ended - admitted for handle, span in written for _ in handle.num_completion_tokens])
        token_seconds = float(np.min(ended / np.maximum(lengths, 1)))
        full = self._concurrent(ended, lengths * token_seconds, num_rollout_workers) / num_rollout_workers
        rollout_seconds = float(lengths.sum()) * token_seconds / full
        return StepWork(
            seconds=record["step/seconds"],
            tokens=float(lengths.sum()),
            longest=float(lengths.max()),
            longest_seconds=float(lengths.max()) * token_seconds,
            rollout_seconds=rollout_seconds,
            tail_seconds=max(0.0, float(ended.max()) - rollout_seconds / num_rollout_workers),
            first_seconds=min((span.began for span in scores), default=admitted) - admitted,
            teachers=self._teachers(scores, record["step/seconds"]),
            learn_seconds=record["learn/seconds"],
            last_learn_seconds=record["learn/seconds"] / len(batches),
            sync_seconds=record["sync/seconds"],
        )

    def _concurrent(self, ended: Seconds, seconds: Seconds, num_workers: int) -> float:
        """Return how many completions the workers write at a time when they are full.

        Where all ran together from the start, that is what the engine allows, or what was seen when some had to wait.
        The seconds of a completion are those of an unhindered one; where an engine is slower when it is full, both they
        and the result are too small by the same factor, which leaves the work as it is.
        """
        found = most_at_a_time(ended - seconds, ended)
        if found < AT_ONCE * len(ended):
            self.max_concurrent = found / num_workers
            return found
        return max(found, self.max_concurrent * num_workers)

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
