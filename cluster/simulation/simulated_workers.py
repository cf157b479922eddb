"""Simulates the actors of a run: workers that only take their time.

They have the methods of the real actors that training calls. The object store holds each batch's handle, and no bytes.
"""

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

from cluster.config.objective import ObjectiveConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Sum
from cluster.contracts.requests import RolloutRequest, SamplingSettings, ScoreRequest
from cluster.simulation.rates import LearnerRates, RolloutRates, TeacherRates, seconds_per_token
from cluster.simulation.simulated_cluster import SimulatedReference, SimulatedTime
from cluster.weight_sync.manifest import WeightSyncReport
from learner.batching.arrivals import RankShare
from rollout_workers.batching import Filling
from rollout_workers.pool import RolloutActorSettings

FORWARD_SHARE = 1 / 3  # of a forward in forward and backward, as its products are
ROUNDING_TOKENS = 1e-6  # by which sums of fractions of tokens may be off


class Decoding:
    """Runs what fits, those of the lowest priority first and among them the first to come.

    All running sequences advance together: one that began when the engine's `progress` was p is finished when it has
    reached p plus its length. So an event is planned for the next one to finish only.
    """

    def __init__(self, time: SimulatedTime, points: Sequence[tuple[int, float]], most_running: int) -> None:
        """Take the clock, seconds per token by the number of running sequences, and the most of them."""
        self._time = time
        self._points = points
        self._most_running = most_running
        self._running: list[tuple[float, int, Callable[[], None]]] = []  # progress at which it finishes, order, done
        self._waiting: list[tuple[int, int, int, Callable[[], None]]] = []  # priority, order, tokens, done
        self._order = count()
        self._progress = 0.0  # tokens of a sequence that has run since the beginning
        self._observed_at = 0.0
        self._num_plans = 0
        self._paused_until = 0.0
        self.busy_seconds = 0.0  # in which something was written

    def write(self, num_tokens: int, priority: int, done: Callable[[], None]) -> None:
        """Begin a sequence, now or when a place is free; `done` is called when it is finished."""
        self._advance()
        heapq.heappush(self._waiting, (priority, next(self._order), num_tokens, done))
        self._go_on()

    def pause(self, seconds: float) -> None:
        self._advance()
        self._paused_until = self._observed_at = self._time.now + seconds
        self._go_on()

    def _advance(self) -> None:
        seconds = max(0.0, self._time.now - self._observed_at)
        if self._running:
            self._progress += seconds / seconds_per_token(self._points, len(self._running))
            self.busy_seconds += seconds
        self._observed_at = max(self._observed_at, self._time.now)

    def _go_on(self) -> None:
        """Begin what fits, and plan for the next sequence to finish."""
        while self._waiting and len(self._running) < self._most_running:
            _, order, num_tokens, done = heapq.heappop(self._waiting)
            heapq.heappush(self._running, (self._progress + num_tokens, order, done))
        if self._running:
            self._num_plans += 1
            seconds = (self._running[0][0] - self._progress) * seconds_per_token(self._points, len(self._running))
            at = max(self._time.now, self._paused_until) + max(0.0, seconds)
            self._time.at(at, partial(self._finish, self._num_plans))

    def _finish(self, plan: int) -> None:
        if plan != self._num_plans:  # something changed since
            return
        self._advance()
        # After so many seconds that the clock cannot tell this moment from the last, nothing would have been written.
        self._progress = max(self._progress, self._running[0][0])
        finished = []
        while self._running and self._running[0][0] <= self._progress + ROUNDING_TOKENS:
            finished.append(heapq.heappop(self._running)[2])
        self._go_on()
        for done in finished:
            done()


@dataclass(frozen=True)
class Trajectory:
    """Counts the tokens of one trajectory that a simulated worker is going to write."""

    trajectory_id: int
    prompt_id: int
    prompt_tokens: int
    completion_tokens: int
    teacher: str


class _Worker:
    """Starts at once."""

    def __init__(self, time: SimulatedTime) -> None:
        self._time = time

    def start(self, *args: Any) -> SimulatedReference:
        return self._resolved()

    def _resolved(self, value: Any = None) -> SimulatedReference:
        reference = self._time.reference()
        reference.resolve(value)
        return reference


Batch = tuple[SimulatedReference, SimulatedReference]  # bytes and handle; one reference stands for both


class SimulatedRolloutWorker(_Worker):
    """Writes completions of known lengths, and sends them on in batches as the real worker does."""

    def __init__(
        self,
        time: SimulatedTime,
        rates: RolloutRates,
        settings: RolloutActorSettings,
        trajectory_of: Callable[[RolloutRequest], Trajectory],
    ) -> None:
        """Take the clock, the engine's rates, what the real actor gets, and the trajectory that answers a request."""
        super().__init__(time)
        self.decoding = Decoding(time, rates.seconds_per_token, settings.engine.concurrent_sequences)
        self._rows_per_batch = settings.rows_per_batch
        self._trajectory_of = trajectory_of
        self._rollouts: dict[int, _Rollout] = {}

    def start_rollout(
        self, call: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings, priority: int
    ) -> Batch:
        """Begin to write, and return a reference to the first batch."""
        rollout = self._rollouts[call] = _Rollout(self._time, len(requests), self._rows_per_batch)
        batch = rollout.next_batch()
        for request in requests:
            trajectory = self._trajectory_of(request)
            self.decoding.write(trajectory.completion_tokens, priority, partial(rollout.add, trajectory))
        return batch

    def next_batch(self, call: int) -> Batch:
        return self._rollouts[call].next_batch()

    @property
    def busy_seconds(self) -> float:
        return self.decoding.busy_seconds


class _Rollout:
    """Puts one call's finished trajectories into batches, while a batch is requested."""

    def __init__(self, time: SimulatedTime, num_trajectories: int, rows_per_batch: int) -> None:
        self._time = time
        self._filling = Filling[Trajectory](num_trajectories, rows_per_batch, time.now)
        self._finished: deque[Trajectory] = deque()
        self._last: deque[list[Trajectory]] = deque()  # batches of the end
        self._requested: SimulatedReference | None = None

    def add(self, trajectory: Trajectory) -> None:
        self._finished.append(trajectory)
        # Trajectories that finish at the same moment are all there before the first of them enters a batch.
        self._time.at(self._time.now, self._answer)

    def next_batch(self) -> Batch:
        self._requested = requested = self._time.reference()
        self._answer()
        return requested, requested

    def _answer(self) -> None:
        trajectories = self._next() if self._requested else None
        if self._requested and trajectories:
            self._requested.resolve(_handle(trajectories, is_last=not self._filling.missing and not self._last))
            self._requested = None

    def _next(self) -> list[Trajectory] | None:
        while self._finished:
            trajectory = self._finished.popleft()
            full = self._filling.add(trajectory.teacher, trajectory, self._time.now)
            if full is not None:
                return full
        if not self._filling.missing:
            self._last = self._last or deque(self._filling.rest())
            return self._last.popleft()
        due_at = self._filling.due_at
        if due_at is not None and due_at <= self._time.now:
            return self._filling.overdue()
        if due_at is not None:
            self._time.at(due_at, self._answer)
        return None


def _handle(trajectories: Sequence[Trajectory], is_last: bool) -> BatchHandle:
    return BatchHandle(
        reference=None,
        teacher=trajectories[0].teacher,
        trajectory_ids=tuple(one.trajectory_id for one in trajectories),
        num_tokens=tuple(one.prompt_tokens + one.completion_tokens for one in trajectories),
        num_completion_tokens=tuple(one.completion_tokens for one in trajectories),
        prompt_ids=tuple(one.prompt_id for one in trajectories),
        rewards=(0.0,) * len(trajectories),
        is_last=is_last,
    )


class SimulatedTeacherWorker(_Worker):
    """Reads batches in the order in which they come, as many at a time as its token budget takes."""

    def __init__(self, time: SimulatedTime, rates: TeacherRates, budget_tokens: int) -> None:
        super().__init__(time)
        self._rates, self._budget_tokens = rates, budget_tokens
        self._queue: deque[tuple[BatchHandle, SimulatedReference]] = deque()
        self._is_busy = False
        self.busy_seconds = 0.0

    def score(self, wire: SimulatedReference, request: ScoreRequest) -> Batch:
        scored = self._time.reference()
        self._queue.append((wire.value, scored))
        if not self._is_busy:
            self._is_busy = True
            self._time.at(self._time.now, self._begin)
        return scored, scored

    def _begin(self) -> None:
        """Read what fits into the budget, at least one batch."""
        batches = [self._queue.popleft()]
        tokens = sum(batches[0][0].num_tokens)
        while self._queue and tokens + sum(self._queue[0][0].num_tokens) <= self._budget_tokens:
            batches.append(self._queue.popleft())
            tokens += sum(batches[-1][0].num_tokens)
        seconds = tokens / self._rates.tokens_per_second + self._rates.seconds_per_pass
        self.busy_seconds += seconds
        self._time.at(self._time.now + seconds, partial(self._end, batches))

    def _end(self, batches: Sequence[tuple[BatchHandle, SimulatedReference]]) -> None:
        for handle, scored in batches:
            scored.resolve(replace(handle, metrics={}))
        self._is_busy = bool(self._queue)
        if self._queue:
            self._begin()


@dataclass
class LearnerClock:
    """Lets no rank begin a micro-batch before all have ended the one before: ZeRO's collectives wait for each other."""

    time: SimulatedTime
    rates: LearnerRates
    num_ranks: int
    sync_seconds: float
    free_at: float = 0.0
    busy_seconds: float = 0.0  # mean over ranks, without the time in which a rank waits for a slower one
    calls: list[tuple[float, SimulatedReference]] = field(default_factory=list)  # until all ranks have theirs

    def compute(self, seconds: float) -> SimulatedReference:
        """Return a reference to the end of what one rank computes for so long, and the others beside it."""
        reference = self.time.reference()
        self.calls.append((seconds, reference))
        if len(self.calls) == self.num_ranks:
            self.free_at = max(self.free_at, self.time.now) + max(seconds for seconds, _ in self.calls)
            self.busy_seconds += sum(seconds for seconds, _ in self.calls) / self.num_ranks
            for of_rank, answer in self.calls:
                self.time.at(self.free_at, partial(answer.resolve, {"busy_seconds": Sum(of_rank)}))
            self.calls = []
        return reference


class SimulatedRank(_Worker):
    """Takes the time of one rank of the learner."""

    def __init__(self, clock: LearnerClock) -> None:
        super().__init__(clock.time)
        self._clock = clock

    @property
    def busy_seconds(self) -> float:
        """Return the seconds in which it computed, the mean over ranks."""
        return self._clock.busy_seconds

    def address(self) -> SimulatedReference:
        return self._resolved("nowhere")

    def accumulate(
        self, share: RankShare, completes_step: bool, objective: ObjectiveConfig | None
    ) -> SimulatedReference:
        """Take the time of the rank's micro-batches."""
        return self._clock.compute(self._seconds(share))

    def advantage_sums(self, share: RankShare, objective: ObjectiveConfig | None) -> SimulatedReference:
        """Take the time of a forward without a backward."""
        return self._clock.compute(self._seconds(share) * FORWARD_SHARE)

    def _seconds(self, share: RankShare) -> float:
        lengths = [tokens for wire in share.references for tokens in wire.value.num_tokens]
        tokens = sum(lengths[index] for grid in share.grids for row in grid for index in row)
        rates = self._clock.rates
        num_micro_batches = sum(bool(grid) for grid in share.grids)
        return tokens / rates.tokens_per_second + rates.seconds_per_micro_batch * num_micro_batches

    def take_step(self, num_tokens: int, step: int) -> SimulatedReference:
        return self._clock.compute(self._clock.rates.optimizer_seconds)

    def publish_weights(self, workers: Sequence[Any], policy_version: int) -> SimulatedReference:
        """Take the time of a weight sync, in which the rollout workers write nothing."""
        seconds = self._clock.sync_seconds
        for handle in workers:
            handle.worker.decoding.pause(seconds)
        reference = self._time.reference()
        report = WeightSyncReport(policy_version, "", 0, seconds)
        self._time.at(self._time.now + seconds, partial(reference.resolve, report))
        return reference
