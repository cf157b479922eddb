"""Moves trajectories through rollout and teacher pools, and gives them out by the rollout that asked for them.

Whatever finishes anywhere is passed on at once: completions to their teachers, scored batches to who asks for their
rollout. In training a rollout is a step, and several can be under way together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter

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
    ) -> None:
        """Hand a step's requests to the rollout workers; returns at once."""
        now = perf_counter()
        self._under_way[step] = Progress(scorers, len(requests), now, now, now)
        self._rollouts.submit(step, requests, sampling, verifier)

    def progress(self, step: int) -> Progress:
        """Return how far an admitted step is."""
        return self._under_way[step]

    def batches(self, step: int) -> Iterator[BatchHandle]:
        """Yield an admitted step's batches as they are scored, in any order, until every trajectory was given out.

        Raises:
            RolloutError: an engine gave up a request.
            ScoreError: scores cannot be training data.
            ActorError: an actor died, or nothing finished in time; says who is late.
        """
        progress = self._under_way[step]
        given = 0
        while given < len(progress.finished) or progress.missing:
            if given == len(progress.finished):
                self._advance()
            for handle in progress.finished[given:]:
                given += 1
                yield handle
        del self._under_way[step]

    def run(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str, scorers: Scorers
    ) -> list[BatchHandle]:
        """Return the batches of requests that belong to no step, ahead of those that do."""
        rollout = next(self._extra_ids)
        self.admit(rollout, requests, sampling, verifier, scorers)
        return list(self.batches(rollout))

    def _advance(self) -> None:
        """Wait until something finishes, then pass on everything that has."""
        written, scored = self._rollouts.awaited, self._teachers.outstanding
        if not ray.wait([*written, *scored], num_returns=1, timeout=self._timeout_seconds)[0]:
            late = ", ".join(names for names in (self._rollouts.late(), self._teachers.late()) if names)
            raise ActorError(f"waited {self._timeout_seconds:.0f} s for trajectories from {late}")
        for reference in _ready(written):
            handle = self._rollouts.take(reference)
            if handle is not None:
                self._send_on(handle)
        self._finish(self._teachers.collect())

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


def _ready(references: Sequence[object]) -> list[object]:
    if not references:
        return []
    ready: list[object] = ray.wait(references, num_returns=len(references), timeout=0)[0]
    return ready
