"""Moves trajectories through rollout and teacher pools, and gives them out by the rollout that asked for them.

Whatever finishes anywhere is passed on at once: completions to their teachers, scored batches to who asks for their
rollout. In training a rollout is a step, and several can be under way together.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any

import ray

from cluster.contracts.errors import ActorError
from cluster.contracts.interfaces import BatchHandle, RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutPool
from teacher_workers.pool import Chain, TeacherPools

Scorers = Callable[[str], Chain]  # route -> who scores its batches; nobody: they are given out as they were written


@dataclass
class Progress:
    """One rollout, from its admission to its last scored batch; times are on the clock of `perf_counter`."""

    scorers: Scorers
    missing: int  # trajectories that are still written or scored
    admitted_at: float
    written_at: float  # when the last completion so far came back
    finished_at: float  # when the last batch so far was scored
    finished: list[BatchHandle] = field(default_factory=list)


class Flow:
    """The way from requests to scored batches, for any number of rollouts at once."""

    def __init__(self, rollouts: RolloutPool, teachers: TeacherPools, timeout_seconds: float) -> None:
        """Take the pools, and how long to wait for anything to finish."""
        self._rollouts = rollouts
        self._teachers = teachers
        self._timeout_seconds = timeout_seconds
        self._under_way: dict[int, Progress] = {}
        # Below every step, so that who waits for an extra rollout does not wait behind a step's.
        self._extra_ids = count(-1, -1)

    def admit(
        self,
        step: int,
        requests: Sequence[RolloutRequest],
        sampling: SamplingSettings,
        verifier: str,
        scorers: Scorers,
    ) -> "StepBatches":
        """Hand a step's requests to the rollout workers, and return at once what gives its batches out."""
        now = perf_counter()
        progress = self._under_way[step] = Progress(scorers, len(requests), now, now, now)
        self._rollouts.submit(step, requests, sampling, verifier)
        return StepBatches(progress, self._advance)

    def run(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str, scorers: Scorers
    ) -> list[BatchHandle]:
        """Return the batches of requests that belong to no step, ahead of those that do."""
        batches, handles = self.admit(next(self._extra_ids), requests, sampling, verifier, scorers), []
        while not batches.is_exhausted:
            handles += batches.take()
        return handles

    def _advance(self, wake_on: Sequence[Any]) -> bool:
        """Wait until something finishes, pass on everything that has, and say whether a reference of `wake_on` has."""
        references = [*self._rollouts.awaited, *self._teachers.outstanding, *wake_on]
        # First what is there: under load there always is something, and no second look is needed.
        found = ray.wait(references, num_returns=len(references), timeout=0)[0]
        found = found or ray.wait(references, num_returns=1, timeout=self._timeout_seconds)[0]
        if not found:
            late = ", ".join(names for names in (self._rollouts.late(), self._teachers.late()) if names)
            raise ActorError(f"waited {self._timeout_seconds:.0f} s for trajectories from {late}")
        ready = set(found)
        for reference in ready.intersection(self._rollouts.awaited):
            self._send_on(self._rollouts.take(reference))
        self._finish(self._teachers.collect(ready))
        return not ready.isdisjoint(wake_on)

    def _send_on(self, handle: BatchHandle) -> None:
        progress = self._under_way[handle.rollout]
        progress.written_at = perf_counter()
        chain = progress.scorers(handle.teacher)
        if chain:
            self._teachers.submit(handle, chain)
        else:
            self._finish([handle])

    def _finish(self, handles: Iterable[BatchHandle]) -> None:
        for handle in handles:
            progress = self._under_way[handle.rollout]
            progress.finished_at = perf_counter()
            progress.missing -= len(handle.trajectory_ids)
            progress.finished.append(handle)
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
