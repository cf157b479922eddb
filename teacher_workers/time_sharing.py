"""Lets several teachers score in turns on the hardware of one: an engine is awake, the others sleep."""

import asyncio
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.actors.liveness import end_with_engine
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Sum
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.wire import from_wire
from teacher_workers.actor import _answer, _tell_why, start_worker

if TYPE_CHECKING:
    from teacher_workers.worker import TeacherWorker
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

# While others wait, a turn that has work goes on this long, so at most one part in eleven of a busy slot's time goes
# into switching.
LONGEST_TURN_SWITCHES = 10.0
# A teacher that has nothing to do keeps its turn so long while others wait: the next completions of the same rollout
# are most often under way to it. Longer pauses would cost more than the switches that they save.
PATIENCE_SWITCHES = 0.25


class Turns:
    """Requests of several teachers, of which those of one at a time run.

    Example:
        >>> times = iter((0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0))
        >>> turns = Turns(["math", "code"], awake="math", switch_seconds=2.0, clock=lambda: next(times))
        >>> turns.arrive("math"), turns.arrive("code"), turns.admit(), turns.due()
        (None, None, 1, None)
        >>> turns.finish(), turns.due()
        (None, 'code')
    """

    def __init__(self, teachers: Sequence[str], awake: str, switch_seconds: float, clock: Callable[[], float]) -> None:
        """Begin with the turn of `awake`, whose engine runs.

        Args:
            teachers: all names.
            awake: one of them.
            switch_seconds: what a switch will take, until one has been seen.
            clock: seconds.
        """
        self.awake = awake
        self._clock = clock
        self._waiting: dict[str, deque[float]] = {teacher: deque() for teacher in teachers}  # times of arrival
        self._began = self._idle_since = clock()
        self._rested_since = dict.fromkeys(teachers, self._began)  # when each teacher's last turn ended
        self._num_running = 0
        self._has_run = False  # in the present turn; one in which nothing ran would be for nothing
        self._switch_seconds = switch_seconds

    def arrive(self, teacher: str) -> None:
        """Take in a request."""
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
        """Note that a running request is done."""
        self._num_running -= 1
        self._idle_since = self._clock()

    def due(self) -> str | None:
        """Return whose engine is to be woken now; None: nobody's."""
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


class Sleeper(Protocol):
    """Gives the hardware back and takes it again."""

    async def sleep(self) -> None:
        """Give back what another engine needs; nothing is asked of this one until it is woken."""

    async def wake(self) -> None:
        """Take it again."""


@dataclass
class Woken:
    """What the switches cost that nobody was told of yet."""

    num_switches: int = 0
    seconds: float = 0.0


class TimeShare:
    """Gives turns; `conduct` must run beside the requests, and what it raises ends all hope of a turn."""

    def __init__(
        self,
        sleepers: Mapping[str, Sleeper],
        awake: str,
        switch_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take the teachers by name, of whom all but `awake` sleep; the rest is as in Turns."""
        self._sleepers = sleepers
        self._clock = clock
        self._turns = Turns(list(sleepers), awake, switch_seconds, clock)
        self._places: dict[str, deque[asyncio.Future[None]]] = {teacher: deque() for teacher in sleepers}
        self._changed = asyncio.Event()
        self._woken = {teacher: Woken() for teacher in sleepers}

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

    def take_woken(self, teacher: str) -> Woken:
        """Return, once, what the switches to a teacher cost."""
        woken, self._woken[teacher] = self._woken[teacher], Woken()
        return woken

    async def conduct(self) -> None:
        """Give turns for ever.

        Raises:
            Exception: an engine would not sleep or wake.
        """
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
        await self._sleepers[self._turns.awake].sleep()
        await self._sleepers[teacher].wake()
        seconds = self._clock() - began
        self._turns.switched(teacher, seconds)
        woken = self._woken[teacher]
        woken.num_switches, woken.seconds = woken.num_switches + 1, woken.seconds + seconds

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
                await self._workers[awake].sleep()
                sleeping_seconds = max(sleeping_seconds, time.monotonic() - began)
            name = f"{self._name}, teacher {teacher}"
            self._workers[teacher] = await start_worker(name, config, self._max_model_len, sleeps=True)
            awake = teacher
        # Waking is taken to cost what sleeping does, until it has been seen.
        self._share = TimeShare(self._workers, awake, switch_seconds=2 * sleeping_seconds)
        conducting = asyncio.create_task(self._share.conduct())
        conducting.add_done_callback(_tell_why)
        watching = asyncio.create_task(
            end_with_engine(lambda: conducting.done() or any(worker.is_dead for worker in self._workers.values()))
        )
        self._tasks = [watching, conducting]

    async def score(self, wire: pa.Buffer, request: ScoreRequest, teacher: str) -> tuple[pa.Buffer, BatchHandle]:
        """Score one batch when it is the teacher's turn."""
        async with self._share.turn(teacher):
            scored, metrics = await self._workers[teacher].score(from_wire(wire), request)
        woken = self._share.take_woken(teacher)
        switches = {"slot/switches": Sum(float(woken.num_switches)), "slot/switch_seconds": Sum(woken.seconds)}
        return _answer(wire, scored, {**metrics, **switches}, request)

    async def shutdown(self) -> None:
        """End the engines' processes."""
        for task in self._tasks:
            task.cancel()
        for worker in self._workers.values():
            await worker.shutdown()
