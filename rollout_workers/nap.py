"""Lets an engine sleep while nobody needs it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any


class Nap:
    """Counts who needs an engine; it is awake while anybody does, and falls asleep when the last one is done.

    Args:
        sleep: puts the engine to sleep.
        wake: wakes it.
    """

    def __init__(self, sleep: Callable[[], Awaitable[Any]], wake: Callable[[], Awaitable[Any]]) -> None:
        self._sleep, self._wake = sleep, wake
        self._needed_by = 0
        self._is_asleep = False
        self._lock = asyncio.Lock()  # nobody uses an engine that is on its way to sleep, or not quite awake

    async def begin(self) -> None:
        """Need the engine from now on; returns when it is awake."""
        async with self._lock:
            if self._is_asleep:
                await self._wake()
                self._is_asleep = False
            self._needed_by += 1

    async def end(self) -> None:
        """Need it no more."""
        async with self._lock:
            self._needed_by -= 1
            if self._needed_by == 0:
                await self._sleep()
                self._is_asleep = True

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """Need the engine for as long as a `with` statement lasts."""
        await self.begin()
        try:
            yield
        finally:
            await self.end()
