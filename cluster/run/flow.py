"""Moves trajectories through rollout and teacher pools, and gives them out by the rollout that requested them.

Whatever finishes anywhere is passed on at once: completions to their teachers, scored batches to the caller that takes
their rollout. In training a rollout is a step, and several can be under way together.

`learner.step` pulls; waiting for its next batch drives the rollout and teacher pools:

| caller | call | what it waits for | what wakes it |
|---|---|---|---|
| driver | `flow.admit` | nothing | - |
| driver | `learner.step` | all gradients, then the optimizer step | answers of the ranks |
| `learner.step` | `StepBatches.take` | a scored batch of its step | a batch, or a rank in `wake_on` |
| `learner.step` | `StepBatches.move_on_until` | an answer of a rank, while other steps move on | the ranks |
| both | `Flow.advance` | any event of any pool, for all steps under way | a rollout worker, teacher or rank |
| `advance` | `poll`, `maintain` | nothing: hooks act, dead workers restart | called at least every second |
| driver | `learner.publish_weights` | all rollout workers have the new weights | the workers' checksums |
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cluster.contracts.batches import BatchHandle, Span
from cluster.contracts.requests import RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from rollout_workers.pool import RolloutPool
    from teacher_workers.pool import Route
    from teacher_workers.router import TeacherRouter

MAX_SPANS = 100_000  # calls that are kept until their spans are taken, if ever

_log = logging.getLogger("preceptor")

ScoringPlan = Callable[[str], "Route"]  # route -> teachers that score its batches; empty: they are given out unscored


@dataclass
class StepBatches:
    """Gives out one rollout's batches as they are scored; a BatchSource. Times are on the clock of `perf_counter`."""

    requests: Sequence[RolloutRequest]
    sampling: SamplingSettings
    scorers: ScoringPlan
    flow: "Flow"
    missing: int  # trajectories that are still generated or scored
    admitted_at: float
    generated_at: float  # when the last completion so far came back
    finished_at: float  # when the last batch so far was scored
    finished: list[BatchHandle] = field(default_factory=list)
    _num_given: int = 0

    @property
    def is_exhausted(self) -> bool:
        return not self.missing and self._num_given == len(self.finished)

    def take(self, wake_on: Sequence[Any] = ()) -> list[BatchHandle]:
        """Return the batches not given out yet, waiting for one; with none when a reference of `wake_on` is ready.

        Raises:
            RolloutError: an engine gave up a request.
            ScoreError: scores cannot be training data.
            ActorError: an actor died, or nothing finished in time; names what is late.
        """
        while self._num_given == len(self.finished) and self.missing:
            if self.flow.advance(wake_on):
                break
        given = self.finished[self._num_given :]
        self._num_given = len(self.finished)
        return given

    def move_on_until(self, references: Sequence[Any]) -> None:
        """Move other steps on until a reference is ready: teachers score their batches while the learner computes.

        Raises:
            PreceptorError: as `take`, of any step under way.
        """
        while self.flow.is_moving and not self.flow.advance(references):
            pass


class Flow:
    """Takes requests to scored batches, for any number of rollouts at once."""

    def __init__(
        self,
        rollouts: "RolloutPool",
        teachers: "TeacherRouter",
        timeout_seconds: float,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the pools; `poll` is called before each wait for them, and at least every second of it."""
        self._rollouts, self._teachers = rollouts, teachers
        self._timeout_seconds, self._poll = timeout_seconds, poll
        self._under_way: dict[int, StepBatches] = {}
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)
        # Below every step, so that an extra rollout does not wait behind a step's.
        self._extra_ids = count(-1, -1)

    def admit(
        self,
        step: int,
        requests: Sequence[RolloutRequest],
        sampling: SamplingSettings,
        scorers: ScoringPlan,
        replayed: Callable[[], Sequence[BatchHandle]] = tuple,
    ) -> StepBatches:
        """Hand a step's requests to the rollout workers, and return at once what gives its batches out.

        `replayed` reads further batches of the step, which are there already, and have their scores or get them.
        """
        began = perf_counter()
        handles = replayed()
        missing = len(requests) + sum(handle.num_episodes for handle in handles)
        now = perf_counter()
        batches = self._under_way[step] = StepBatches(requests, sampling, scorers, self, missing, began, now, now)
        if requests:
            self._rollouts.submit(step, requests, sampling)
        for handle in handles:
            if handle.scored_by:
                self._finish([handle])
            else:
                self._score(handle)
        return batches

    def run(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, scorers: ScoringPlan
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

    @property
    def is_moving(self) -> bool:
        """Return whether trajectories of any rollout are still generated or scored."""
        return bool(self._under_way)

    def advance(self, wake_on: Sequence[Any] = ()) -> set[Any]:
        """Wait until something finishes, pass on everything that has, and return which references of `wake_on` have."""

        def pending() -> list[Any]:
            self._poll()
            return [*self._rollouts.maintain(), *self._teachers.maintain(), *wake_on]

        ready = self._rollouts.cluster.wait_for_any(pending, self._timeout_seconds, self._waited_for)
        for handle in self._rollouts.collect(ready):
            self._score(handle)
        self._finish(self._teachers.collect(ready))
        for handle in self._teachers.take_lost():
            self._generate_again(handle)
        return set(ready).intersection(wake_on)

    def _waited_for(self) -> str:
        late = ", ".join(names for names in (self._rollouts.late(), self._teachers.late()) if names)
        return f"trajectories from {late}"

    def _score(self, handle: BatchHandle) -> None:
        batches = self._under_way[handle.rollout]
        batches.generated_at = perf_counter()
        chain = batches.scorers(handle.teacher)
        if chain:
            self._teachers.submit(handle, chain)
        else:
            self._finish([handle])

    def _generate_again(self, handle: BatchHandle) -> None:
        """Request completions once more whose bytes are gone with the node that held them."""
        batches = self._under_way[handle.rollout]
        _log.warning("%d completions are gone with their node and are requested again", handle.num_episodes)
        lost = [request for request in batches.requests if request.trajectory_id in handle.episodes]
        self._rollouts.submit(handle.rollout, lost, batches.sampling)

    def _finish(self, handles: Iterable[BatchHandle]) -> None:
        for handle in handles:
            batches = self._under_way[handle.rollout]
            batches.finished_at = perf_counter()
            batches.missing -= handle.num_episodes
            batches.finished.append(handle)
            self._spans.extend(handle.spans)
            if not batches.missing:
                self._under_way.pop(handle.rollout)
