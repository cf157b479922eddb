"""Fetches finished requests' draws from the engine's worker, those that finish together in one call."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

Encoded = tuple[bytes, bytes]  # as draw_processor.WorkerExtension returns them
NOTHING: Encoded = (b"", b"")  # of a request that the worker does not know
Call = Callable[[Mapping[str, int], list[str]], Awaitable[Mapping[str, Encoded]]]


class DrawFetcher:
    """Collects what is wanted while a call is under way, and asks for all of it with the next one."""

    def __init__(self, call: Call) -> None:
        """Take the way to the worker: from wanted keys with their number of tokens, and keys to forget, to draws."""
        self._call = call
        self._wanted: dict[str, int] = {}
        self._given_up: list[str] = []
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[Mapping[str, Encoded]] | None = None

    def give_up(self, key: str) -> None:
        """Let the worker forget a request with the next call."""
        self._given_up.append(key)

    async def fetch(self, key: str, num_tokens: int) -> Encoded:
        """Return a request's draws, once; a caller that is cancelled takes nothing from the others."""
        self._wanted[key] = num_tokens
        if self._next is None:
            self._next = asyncio.create_task(self._fetch_wanted())
        return (await asyncio.shield(self._next)).get(key, NOTHING)

    async def _fetch_wanted(self) -> Mapping[str, Encoded]:
        async with self._turn:
            wanted, given_up = self._wanted, self._given_up
            self._wanted, self._given_up, self._next = {}, [], None
            return await self._call(wanted, given_up)
