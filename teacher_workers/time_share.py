"""Lets several teachers score in turns on the hardware of one: an engine is awake, the others sleep."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from teacher_workers.turns import Turns


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
