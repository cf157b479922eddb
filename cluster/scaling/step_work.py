"""What one step asked of every pool, in seconds of its workers, from the step's own batches; pure.

A busy worker says little about a rollout pool: one straggler keeps its worker busy to the end, and no further worker
would shorten it. So a step's generation is taken apart into what more workers share, and what they do not: the longest
completion by itself, and the tail in which fewer completions are written than could be.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.observation import Span
from cluster.scaling.decoding_pace import Pace, Seconds, Written, all_ran_at_once, most_at_a_time, written_batches

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
