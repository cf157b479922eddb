"""Runs verifiers beside the event loop of a rollout worker.

Comparing mathematics can take for ever: a completion may ask for 9^(9^9). math-verify stops itself by an alarm, which
only a main thread may set, so it runs as the main thread of a process of its own. The other verifiers take
microseconds and run where they are called.
"""

import asyncio
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from rollout_workers.verifiers import verify

SLOW_VERIFIERS = frozenset({"math"})


class Judge:
    """Gives rewards; owns at most one process, which starts with the first completion that needs it."""

    def __init__(self) -> None:
        self._process: ProcessPoolExecutor | None = None

    async def reward(self, verifier: str, completion: str, answer: str, finish_reason: str) -> float:
        """Return `verify`'s reward without holding up the event loop."""
        if verifier not in SLOW_VERIFIERS:
            return verify(verifier, completion, answer, finish_reason)
        if self._process is None:
            self._process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._process, verify, verifier, completion, answer, finish_reason)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.shutdown(wait=False, cancel_futures=True)
