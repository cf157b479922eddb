"""Lets several teachers score in turns on the hardware of one: one backend is awake, the others sleep."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pyarrow as pa

from cluster.actors.cluster import RAY, Cluster, PoolTimeouts
from cluster.actors.liveness import end_with_engine
from cluster.actors.replicas import Supervision
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Sum
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.wire import from_wire
from teacher_workers.actor import TeacherWorker, pack_scored, start_worker
from teacher_workers.backends.base import TeacherBackend
from teacher_workers.pool import TeacherPool, TeacherReplicas

SLOT_ACTOR = "teacher_workers.time_sharing:SlotActor"

_log = logging.getLogger("preceptor")

# While others wait, a turn that has work goes on this long, so at most one part in eleven of a busy slot's time goes
# into switching.
LONGEST_TURN_SWITCHES = 10.0
# A teacher that has nothing to do keeps its turn so long while others wait: the next completions of the same rollout
# are most often under way to it. Longer pauses would cost more than the switches that they save.
PATIENCE_SWITCHES = 0.25


def start_slot(
    label: str,
    teachers: Mapping[str, TeacherConfig],
    max_model_len: int,
    options: Sequence[Mapping[str, Any]],
    timeouts: PoolTimeouts,
    cluster: Cluster = RAY,
    supervision: Supervision | None = None,
) -> dict[str, TeacherPool]:
    """Begin to start the replicas of several teachers, called LABEL-0, ..., and return a pool of each teacher."""

    def arguments(actor_name: str) -> tuple[Any, ...]:
        return actor_name, teachers, max_model_len

    replicas = TeacherReplicas(label, SLOT_ACTOR, teachers, arguments, options, cluster, supervision)
    return {name: TeacherPool(name, replicas, timeouts, in_slot=True) for name in teachers}


class TurnOrder:
    """Decides which of several teachers' requests run; those of one teacher at a time do.

    Example:
        >>> times = iter((0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0))
        >>> turns = TurnOrder(["math", "code"], awake="math", switch_seconds=2.0, clock=lambda: next(times))
        >>> turns.arrive("math"), turns.arrive("code"), turns.admit(), turns.due()
        (None, None, 1, None)
        >>> turns.finish(), turns.due()
        (None, 'code')
    """

    def __init__(self, teachers: Sequence[str], awake: str, switch_seconds: float, clock: Callable[[], float]) -> None:
        """Begin with the turn of `awake`, whose engine runs; `switch_seconds` are expected until a switch was seen."""
        self.awake = awake
        self._clock = clock
        self._waiting: dict[str, deque[float]] = {teacher: deque() for teacher in teachers}  # times of arrival
        self._began = self._idle_since = clock()
        self._rested_since = dict.fromkeys(teachers, self._began)  # when each teacher's last turn ended
        self._num_running = 0
        self._has_run = False  # in the present turn; a turn in which nothing ran has no use
        self._switch_seconds = switch_seconds

    def arrive(self, teacher: str) -> None:
        self._waiting[teacher].append(self._clock())

    def admit(self) -> int:
        """Return how many waiting requests of the present teacher, the first ones, run from now on."""
        if self._is_over():
            return 0
        waiting = self._waiting[self.awake]
        count = len(waiting)
        waiting.clear()
        self._num_running += count
        self._has_run = self._has_run or count > 0
        return count

    def finish(self) -> None:
        self._num_running -= 1
        self._idle_since = self._clock()

    def due(self) -> str | None:
        """Return the teacher whose backend is to be woken now, if any."""
        longest_waiting = self._longest_waiting()
        if self._num_running or longest_waiting is None:
            return None
        if self._is_over() or (not self._waiting[self.awake] and self._patience_left() <= 0):
            return longest_waiting
        return None

    def seconds_left(self) -> float | None:
        """Return after how long `due` may say something else though nothing has happened; None: never."""
        if self._num_running or self._longest_waiting() is None:
            return None
        return max(0.0, self._patience_left())

    def switched(self, teacher: str, seconds: float) -> None:
        """Note that a teacher was woken, and how long it took from the end of the turn before."""
        now = self._clock()
        self._rested_since[self.awake] = now - seconds
        self.awake, self._switch_seconds = teacher, seconds
        self._began = self._idle_since = now
        self._has_run = False

    def _waits_since(self, teacher: str) -> float:
        """Return since when a teacher has waited for a turn: its oldest request, or the end of its last turn."""
        return max(self._waiting[teacher][0], self._rested_since[teacher])

    def _longest_waiting(self) -> str | None:
        others = [teacher for teacher, waiting in self._waiting.items() if waiting and teacher != self.awake]
        return min(others, key=self._waits_since, default=None)

    def _is_over(self) -> bool:
        """Tell whether the present turn has lasted as long as others must wait."""
        longest_waiting = self._longest_waiting()
        if longest_waiting is None or not self._has_run:
            return False
        contested_since = max(self._began, self._waits_since(longest_waiting))
        return self._clock() - contested_since >= LONGEST_TURN_SWITCHES * self._switch_seconds

    def _patience_left(self) -> float:
        return self._idle_since + PATIENCE_SWITCHES * self._switch_seconds - self._clock()


class TimeSharing:
    """Gives turns; `conduct` must run beside the requests, and no turn comes after it has raised an error."""

    def __init__(
        self,
        backends: Mapping[str, TeacherBackend],
        awake: str,
        switch_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the teachers by name, of which all but `awake` sleep; the rest is as in TurnOrder."""
        self._backends = backends
        self._clock = clock
        self._turns = TurnOrder(list(backends), awake, switch_seconds, clock)
        self._places: dict[str, deque[asyncio.Future[None]]] = {teacher: deque() for teacher in backends}
        self._changed = asyncio.Event()
        self._woken = dict.fromkeys(backends, (0, 0.0))  # switches to each teacher that no metric has yet, and seconds

    @asynccontextmanager
    async def turn(self, teacher: str) -> AsyncIterator[None]:
        """Wait for a turn of the teacher, and hold it while the context lasts; many may hold the same turn."""
        place = asyncio.get_running_loop().create_future()
        self._places[teacher].append(place)
        self._turns.arrive(teacher)
        self._changed.set()
        await place
        try:
            yield
        finally:
            self._finish()

    def take_woken(self, teacher: str) -> tuple[int, float]:
        """Return, once, how many switches to a teacher there were, and the seconds that they took."""
        woken, self._woken[teacher] = self._woken[teacher], (0, 0.0)
        return woken

    async def conduct(self) -> None:
        """Give turns for ever, in a task of its own, until an engine would not sleep or wake, and raises its error."""
        while True:
            self._changed.clear()
            self._admit()
            due = self._turns.due()
            if due is not None:
                await self._switch(due)
                continue
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._turns.seconds_left())

    def _admit(self) -> None:
        places = self._places[self._turns.awake]
        for _ in range(self._turns.admit()):
            place = places.popleft()
            if place.cancelled():
                self._finish()
            else:
                place.set_result(None)

    async def _switch(self, teacher: str) -> None:
        began = self._clock()
        await self._backends[self._turns.awake].sleep()
        await self._backends[teacher].wake()
        seconds = self._clock() - began
        self._turns.switched(teacher, seconds)
        num_switches, earlier_seconds = self._woken[teacher]
        self._woken[teacher] = num_switches + 1, earlier_seconds + seconds

    def _finish(self) -> None:
        self._turns.finish()
        self._changed.set()


class SlotActor:
    """Runs one TeacherWorker per teacher of a slot in an actor; one is awake at a time, and each has its turns."""

    def __init__(self, name: str, teachers: Mapping[str, TeacherConfig], max_model_len: int) -> None:
        self._name = name
        self._teachers = teachers
        self._max_model_len = max_model_len
        self._workers: dict[str, TeacherWorker] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Build all engines, one after the other; the last one stays awake."""
        sleeping_seconds, awake = 0.0, ""
        for teacher, config in self._teachers.items():
            if awake:
                began = time.monotonic()
                await self._workers[awake].backend.sleep()
                sleeping_seconds = max(sleeping_seconds, time.monotonic() - began)
            name = f"{self._name}, teacher {teacher}"
            self._workers[teacher] = start_worker(name, config, self._max_model_len, sleeps=True)
            awake = teacher
        # Waking is taken to cost what sleeping does, until it has been seen.
        backends = {teacher: worker.backend for teacher, worker in self._workers.items()}
        self._share = TimeSharing(backends, awake, switch_seconds=2 * sleeping_seconds)
        conducting = asyncio.create_task(self._share.conduct())
        conducting.add_done_callback(_log_failure)
        watching = asyncio.create_task(
            end_with_engine(lambda: conducting.done() or any(backend.is_dead for backend in backends.values()))
        )
        self._tasks = [watching, conducting]

    async def score(self, wire: pa.Buffer, request: ScoreRequest, teacher: str) -> tuple[Pieces, BatchHandle]:
        async with self._share.turn(teacher):
            scored, metrics = await self._workers[teacher].score(from_wire(wire), request)
        num_switches, seconds = self._share.take_woken(teacher)
        switches = {"slot/switches": Sum(float(num_switches)), "slot/switch_seconds": Sum(seconds)}
        return pack_scored(wire, scored, {**metrics, **switches}, request.model)

    async def shutdown(self) -> None:
        for task in self._tasks:
            task.cancel()
        for worker in self._workers.values():
            await worker.backend.shutdown()


def _log_failure(task: asyncio.Task[None]) -> None:
    """Log what ended the task that gives turns; the actor ends with it."""
    if not task.cancelled():
        _log.error("an engine did not go to sleep or wake: %s", task.exception())
