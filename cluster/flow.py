"""Moves the trajectories of one or several steps through rollout and teacher pools, and gives them out step by step.

Whatever finishes anywhere is passed on at once: completions to their teachers, scored batches to who asks for their
step. Several steps can be under way together; how many is decided by who admits them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import ray

from cluster.contracts.errors import ActorError
from cluster.contracts.interfaces import BatchHandle, RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutPool
from teacher_workers.pool import Chain, TeacherPools


@dataclass
class _Step:
    """What of one step has not been given out yet."""

    missing: int  # trajectories that are still written or scored
    written_at: float  # when the last completion so far came back
    scored: deque[BatchHandle] = field(default_factory=deque)


class Flow:
    """The way from requests to scored batches, for any number of steps at once."""

    def __init__(
        self, rollouts: RolloutPool, teachers: TeacherPools, scorers: Callable[[str], Chain], timeout_seconds: float
    ) -> None:
        """Take the pools, who scores what, and how long to wait for anything to finish."""
        self._rollouts = rollouts
        self._teachers = teachers
        self._scorers = scorers
        self._timeout_seconds = timeout_seconds
        self._steps: dict[int, _Step] = {}

    def admit(self, step: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str) -> None:
        """Hand a step's requests to the rollout workers; returns at once."""
        self._steps[step] = _Step(len(requests), perf_counter())
        self._rollouts.submit(step, requests, sampling, verifier)

    def scored(self, step: int) -> Iterator[BatchHandle]:
        """Yield an admitted step's batches as they are scored, in any order, until every trajectory was given out.

        Raises:
            RolloutError: an engine gave up a request.
            ScoreError: scores cannot be training data.
            ActorError: an actor died, or nothing finished in time; says who is late.
        """
        waiting = self._steps[step]
        while waiting.scored or waiting.missing:
            while waiting.scored:
                yield waiting.scored.popleft()
            if waiting.missing:
                self._advance()
        del self._steps[step]

    def written_at(self, step: int) -> float:
        """Return when the last completion of a step so far came back, on the clock of `perf_counter`."""
        return self._steps[step].written_at

    def _advance(self) -> None:
        """Wait until something finishes, then pass on everything that has."""
        written, scored = self._rollouts.awaited, self._teachers.outstanding
        if not ray.wait([*written, *scored], num_returns=1, timeout=self._timeout_seconds)[0]:
            late = ", ".join(name for name in (self._rollouts.late(), self._teachers.late()) if name)
            raise ActorError(f"waited {self._timeout_seconds:.0f} s for trajectories from {late}")
        for reference in _ready(written):
            handle = self._rollouts.take(reference)
            if handle is not None:
                self._steps[handle.rollout].written_at = perf_counter()
                self._teachers.submit(handle, self._scorers(handle.teacher))
        for handle in self._teachers.collect():
            self._steps[handle.rollout].missing -= len(handle.trajectory_ids)
            self._steps[handle.rollout].scored.append(handle)


def _ready(references: Sequence[object]) -> list[object]:
    if not references:
        return []
    ready: list[object] = ray.wait(references, num_returns=len(references), timeout=0)[0]
    return ready
