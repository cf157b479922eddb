"""Moves trajectories through rollout and teacher pools, and gives them out by the rollout that asked for them.

Whatever finishes anywhere is passed on at once: completions to their teachers, scored batches to who asks for their
rollout. In training a rollout is a step, and several can be under way together.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

from cluster.contracts.batches import BatchHandle, Span
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutPool
from teacher_workers.router import Chain, TeacherPools

MOST_SPANS = 100_000  # calls that are remembered for who takes their spans; nobody may

_log = logging.getLogger("preceptor")

Scorers = Callable[[str], Chain]  # route -> who scores its batches; nobody: they are given out as they were written


@dataclass
class Progress:
    """One rollout, from its admission to its last scored batch; times are on the clock of `perf_counter`."""

    requests: Sequence[RolloutRequest]
    sampling: SamplingSettings
    scorers: Scorers
    missing: int  # trajectories that are still written or scored
    admitted_at: float
    written_at: float  # when the last completion so far came back
    finished_at: float  # when the last batch so far was scored
    finished: list[BatchHandle] = field(default_factory=list)


class Flow:
    """The way from requests to scored batches, for any number of rollouts at once."""

    def __init__(
        self,
        rollouts: RolloutPool,
        teachers: TeacherPools,
        timeout_seconds: float,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the pools.

        Args:
            rollouts: write.
            teachers: score.
            timeout_seconds: how long to wait for anything to finish.
            poll: called before each wait, and at least every second of it.
        """
        self._poll = poll
        self._rollouts = rollouts
        self._teachers = teachers
        self._timeout_seconds = timeout_seconds
        self._under_way: dict[int, Progress] = {}
        self._spans: deque[Span] = deque(maxlen=MOST_SPANS)
        # Below every step, so that who waits for an extra rollout does not wait behind a step's.
        self._extra_ids = count(-1, -1)

    def admit(
        self,
        step: int,
        requests: Sequence[RolloutRequest],
        sampling: SamplingSettings,
        scorers: Scorers,
    ) -> "StepBatches":
        """Hand a step's requests to the rollout workers, and return at once what gives its batches out."""
        now = perf_counter()
        progress = self._under_way[step] = Progress(requests, sampling, scorers, len(requests), now, now, now)
        self._rollouts.submit(step, requests, sampling)
        return StepBatches(progress, self._advance)

    def run(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, scorers: Scorers
    ) -> list[BatchHandle]:
        """Return the batches of requests that belong to no step, ahead of those that do."""
        batches, handles = self.admit(next(self._extra_ids), requests, sampling, scorers), []
        while not batches.is_exhausted:
            handles += batches.take()
        return handles

    def take_spans(self) -> list[Span]:
        """Return, once, the calls to workers behind the batches that were finished."""
        spans = list(self._spans)
        self._spans.clear()
        return spans

    def _advance(self, wake_on: Sequence[Any]) -> bool:
        """Wait until something finishes, pass on everything that has, and say whether a reference of `wake_on` has."""

        def pending() -> list[Any]:
            self._poll()
            return [*self._rollouts.maintain(), *self._teachers.maintain(), *wake_on]

        ready = self._rollouts.cluster.wait_for_any(pending, self._timeout_seconds, self._waited_for)
        for handle in self._rollouts.collect(ready):
            self._send_on(handle)
        self._finish(self._teachers.collect(ready))
        for handle in self._teachers.take_lost():
            self._write_again(handle)
        return not set(ready).isdisjoint(wake_on)

    def _waited_for(self) -> str:
        late = ", ".join(names for names in (self._rollouts.late(), self._teachers.late()) if names)
        return f"trajectories from {late}"

    def _send_on(self, handle: BatchHandle) -> None:
        progress = self._under_way[handle.rollout]
        progress.written_at = perf_counter()
        chain = progress.scorers(handle.teacher)
        if chain:
            self._teachers.submit(handle, chain)
        else:
            self._finish([handle])

    def _write_again(self, handle: BatchHandle) -> None:
        """Ask once more for completions whose bytes are gone with the node that held them."""
        progress = self._under_way[handle.rollout]
        _log.warning("%d completions are gone with their node and are asked for again", len(handle.trajectory_ids))
        lost = [request for request in progress.requests if request.trajectory_id in handle.trajectory_ids]
        self._rollouts.submit(handle.rollout, lost, progress.sampling)

    def _finish(self, handles: Iterable[BatchHandle]) -> None:
        for handle in handles:
            progress = self._under_way[handle.rollout]
            progress.finished_at = perf_counter()
            progress.missing -= len(handle.trajectory_ids)
            progress.finished.append(handle)
            self._spans.extend(handle.spans)
            if not progress.missing:
                self._under_way.pop(handle.rollout)


class StepBatches:
    """A BatchSource: one step's batches as they are scored."""

    def __init__(self, progress: Progress, advance: Callable[[Sequence[Any]], bool]) -> None:
        """Take the step, and what moves the flow on by at least one event."""
        self.progress = progress
        self._advance = advance
        self._num_given = 0

    @property
    def is_exhausted(self) -> bool:
        """Return whether every batch was given out."""
        return not self.progress.missing and self._num_given == len(self.progress.finished)

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        """Return the batches not given out yet, waiting for one; with none when a reference of `wake_on` is ready.

        Raises:
            RolloutError: an engine gave up a request.
            ScoreError: scores cannot be training data.
            ActorError: an actor died, or nothing finished in time; says who is late.
        """
        finished = self.progress.finished
        while self._num_given == len(finished) and self.progress.missing:
            if self._advance(wake_on):
                break
        given = finished[self._num_given :]
        self._num_given = len(finished)
        return given
