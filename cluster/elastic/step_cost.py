"""Measures what one step took of every pool, in seconds of its workers, from the step's own batches; pure.

A busy worker says little about a rollout pool: one straggler keeps its worker busy to the end, and no further worker
would shorten it. So a step's generation is taken apart into what more workers share, and what they do not: the longest
completion by itself, and the tail in which fewer completions run than could.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.contracts.batches import BatchHandle, Span

Seconds = NDArray[np.float64]

BINS = 32  # into which a step's generation is cut to find when it was fastest
AT_ONCE = 0.9  # share of a step's completions that, when they ran together, says that none had to wait


@dataclass(frozen=True)
class Generation:
    """Splits a step's generation into what more workers share, and what they do not."""

    longest_seconds: float  # of the longest completion, if no other ran beside it
    full_seconds: float  # of all workers together, each as full as it can be
    tail_seconds: float  # beyond what full workers take

    def seconds(self, num_workers: int) -> float:
        return max(self.longest_seconds, self.full_seconds / num_workers + self.tail_seconds)

    def optimistic(self, num_workers: int) -> "Generation":
        """Return the best case for what so many workers took: that more of them share all of it.

        Completions that run beside the longest one may slow it down, and a step's batches do not say by how much.
        """
        return Generation(0.0, self.seconds(num_workers) * num_workers, 0.0)


@dataclass(frozen=True)
class TeacherWork:
    """Holds one teacher's part of a step."""

    busy_seconds: float  # of all replicas together
    last_seconds: float  # one batch, alone
    queued: float = 0.0  # batches at the replicas, mean over the step


@dataclass(frozen=True)
class StepWork:
    """Holds what one step took."""

    seconds: float
    tokens: float  # completion tokens
    generation: Generation
    first_share: float  # of the generation's seconds, until the first batch is at a teacher
    teachers: Mapping[str, TeacherWork]  # by pool: teachers.NAME
    learn_seconds: float
    last_learn_seconds: float  # one batch
    sync_seconds: float


@dataclass
class WorkMeter:
    """Measures steps, one after the other."""

    max_concurrent: float  # completions that a rollout worker can run at a time, as far as is known
    steps_ahead: int  # of generation before learning
    _counted_until: dict[str, float] = field(default_factory=dict)  # of each teacher worker: steps overlap

    def measure(
        self, record: Mapping[str, float], batches: Sequence[BatchHandle], num_rollout_workers: int
    ) -> StepWork | None:
        """Return what a step took, from its metrics and the batches that it learned from; None: they do not say."""
        calls = [(handle, span) for handle in batches for span in handle.spans if span.stage == "generate"]
        if not calls:
            return None
        admitted = min(span.began for handle in batches for span in handle.spans)
        began = min(span.began for _, span in calls)
        scores = [span for handle in batches for span in handle.spans if span.stage == "score"]
        lengths = np.maximum(1.0, np.concatenate([handle.num_completion_tokens for handle, _ in calls]))
        ended = np.concatenate(
            [np.full(len(handle.num_completion_tokens), span.ended - began) for handle, span in calls]
        )
        first = min((span.began for span in scores), default=admitted)
        return StepWork(
            seconds=record["step/seconds"],
            tokens=float(lengths.sum()),
            generation=self._generation(lengths, ended, num_rollout_workers),
            first_share=min(1.0, (first - admitted) / float(ended.max())),
            teachers=self._teachers(scores, record["step/seconds"]),
            learn_seconds=record["learn/seconds"],
            last_learn_seconds=record["learn/seconds"] / len(batches),
            sync_seconds=record["sync/seconds"],
        )

    def _generation(self, lengths: Seconds, ended: Seconds, num_workers: int) -> Generation:
        """Take a step's generation apart, given each completion's tokens and when it came back.

        The seconds of a token are those of the fastest completion. Where completions had to wait, an engine's limit is
        what ran together; where it is slower when it is full, both are too small by the same factor, which leaves the
        work as it is. Where all ran from the start, the limit is the engine's own, or one seen before.
        """
        token_seconds = float(np.min(ended / lengths))
        together = most_at_a_time(ended - lengths * token_seconds, ended)
        if together >= AT_ONCE * len(lengths):
            full = max(len(lengths) / num_workers, self.max_concurrent)
        else:
            self.max_concurrent = full = together / num_workers
        full_seconds = token_seconds * float(lengths.sum()) / full
        return Generation(
            longest_seconds=token_seconds * float(lengths.max()),
            full_seconds=full_seconds,
            tail_seconds=max(0.0, float(ended.max()) - full_seconds / num_workers),
        )

    def _teachers(self, spans: Iterable[Span], step_seconds: float) -> dict[str, TeacherWork]:
        by_pool: dict[str, list[Span]] = {}
        for span in sorted(spans, key=lambda span: span.began):
            by_pool.setdefault(f"teachers.{span.pool.removeprefix('teacher-')}", []).append(span)
        teachers = {}
        for pool, own in by_pool.items():
            busy = sum(self._newly_busy(span) for span in own)
            queued = sum(span.seconds for span in own) / step_seconds
            teachers[pool] = TeacherWork(busy, busy / len(own), queued)
        return teachers

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
