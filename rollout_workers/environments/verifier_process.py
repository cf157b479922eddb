"""Rewards completions off the event loop: what takes time, and the user's own functions, run in a process of their own.

A reward function is `function(prompt, completion, columns) -> float`, all of it text and plain values: `columns` holds
the further columns of the prompt's row, its `answer`, and the completion's `finish_reason`. A tool is any function of
plain values.
"""

import asyncio
import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from typing import Any, TypeVar

from cluster.contracts.errors import ConfigError, RolloutError
from cluster.contracts.import_path import is_import_path, load_object
from cluster.contracts.metrics import Metric, Sum
from rollout_workers.environments.verifiers import MATH_SECONDS, VERIFIERS, verify

START_SECONDS = 300.0  # for the process to start and to import the modules of reward functions and tools
MOST_CHARACTERS = 20_000  # of what a tool returns; the rest is left out

_log = logging.getLogger("preceptor")

Value = TypeVar("Value")


def check_rewards(names: Iterable[str]) -> None:
    """Raise ConfigError for a name that is no verifier and no function that can be imported."""
    for name in names:
        if not is_import_path(name):
            if name not in VERIFIERS:
                known = ", ".join(VERIFIERS)
                raise ConfigError(
                    f"environment.rewards names '{name}'; expected {known}, or package.module:function for one of yours"
                )
        elif not callable(load_object(name, "a reward")):
            raise ConfigError(f"environment.rewards: '{name}' is no function")


class VerifierProcess:
    """Gives each completion the weighted sum of its rewards; owns at most one process, which starts when needed.

    Calls go to the process one after the other. One that takes too long is ended with the process, and the completion
    has no reward; by `math` it is wrong.
    """

    def __init__(
        self, rewards: str | Mapping[str, float] = "exact", seconds: float = 30.0, tools: Iterable[str] = ()
    ) -> None:
        """Take a verifier, or weights of verifiers and reward functions, the longest time for one call, and tools."""
        self._tools = tuple(tools)
        self._weights = {rewards: 1.0} if isinstance(rewards, str) else rewards
        self._seconds = seconds
        self._process: ProcessPoolExecutor | None = None
        self._pid = 0  # of the process; 0: there is none
        self._lock = asyncio.Lock()
        self._running: asyncio.Future[Any] | None = None  # a call that the process works on
        self._num_timeouts = 0

    async def reward(
        self,
        completion: str,
        answer: str | None,
        finish_reason: str,
        prompt: str = "",
        columns: Mapping[str, Any] | None = None,
    ) -> float | None:
        """Return the reward; None if there is none: no verifier has an answer to compare with, or a call took too long.

        Raises:
            RolloutError: a function of the user's failed, ended its process, or returned no finite number.
        """
        values: list[tuple[float, float]] = []
        given = {**(columns or {}), "answer": answer, "finish_reason": finish_reason}
        for name, weight in self._weights.items():
            if is_import_path(name):
                value = await self._in_process(self._seconds, call_reward, name, prompt, completion, given)
                if value is None:
                    self._num_timeouts += 1
                    _log.warning("reward %s took longer than %g s; the completion has no reward", name, self._seconds)
                    return None
                values.append((weight, value))
            elif answer is not None:
                values.append((weight, await self._verify(name, completion, answer, finish_reason)))
        return sum(weight * value for weight, value in values) if values else None

    async def call_tool(self, path: str, arguments: Mapping[str, Any], seconds: float) -> str:
        """Return what a tool returns, as text; or what went wrong, which begins with "error"."""
        try:
            text = await self._in_process(seconds, call_tool, path, dict(arguments))
        except RolloutError:
            return "error: the tool ended its process"
        return f"error: the tool took longer than {seconds:g} seconds" if text is None else text

    def metrics(self) -> dict[str, Metric]:
        """Return how many completions have no reward since the last call, because it took too long."""
        if not any(is_import_path(name) for name in self._weights):
            return {}
        count, self._num_timeouts = self._num_timeouts, 0
        return {"rollout/reward_timeouts": Sum(float(count))}

    def close(self) -> None:
        if self._process is not None:
            self._process.shutdown(wait=False, cancel_futures=True)

    async def _verify(self, kind: str, completion: str, answer: str, finish_reason: str) -> float:
        if kind != "math":  # the others take no time
            return verify(kind, completion, answer, finish_reason)
        # It reads two expressions and compares them, each with its own limit; this one ends what does not heed that.
        value = await self._in_process(4 * MATH_SECONDS, verify, kind, completion, answer, finish_reason)
        return 0.0 if value is None else value

    async def _in_process(self, seconds: float, function: Callable[..., Value], *arguments: Any) -> Value | None:
        """Call a function in the process and return what it returns, or None if it took longer than its time."""
        async with self._lock:
            process = await self._ready(seconds)
            try:
                self._running = asyncio.wrap_future(process.submit(function, *arguments))
                # Unlike `wait_for`, this leaves the call alone when it is cancelled: `_ready` waits for its end.
                if not (await asyncio.wait({self._running}, timeout=seconds))[0]:
                    self._kill()
                    return None
                running, self._running = self._running, None
                return running.result()
            except BrokenProcessPool as error:
                self._process = self._running = None
                self._pid = 0
                raise RolloutError(f"the process that rewards completions ended in {arguments[0]}") from error

    async def _ready(self, seconds: float) -> ProcessPoolExecutor:
        """Return the process when it is idle; start it if there is none."""
        if self._running is not None:  # of a caller that was cancelled
            if not (await asyncio.wait({self._running}, timeout=seconds))[0]:
                self._kill()
            self._running = None
        if self._process is None:
            process = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
            try:
                loading = asyncio.wrap_future(process.submit(prepare, [*self._weights, *self._tools]))
                self._pid = await asyncio.wait_for(loading, START_SECONDS)
            except (BrokenProcessPool, TimeoutError) as error:
                raise RolloutError(f"the process that rewards completions did not start: {error}") from error
            finally:
                if not self._pid:
                    process.shutdown(wait=False, cancel_futures=True)
            self._process = process
        return self._process

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._pid = 0
        if self._running is not None:
            self._running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # it is expected
        self.close()
        self._process = self._running = None


def prepare(names: Iterable[str]) -> int:
    """Import in the process what rewards need, before any time is taken, and return the process's id."""
    for name in names:
        if is_import_path(name):
            load_object(name, "a reward or a tool")
        elif name == "math":
            import math_verify  # noqa: F401
    return os.getpid()


def call_tool(path: str, arguments: dict[str, Any]) -> str:
    """Return what a tool returns as text: JSON, but for a text itself; or the error that it raises."""
    try:
        value = load_object(path, "a tool")(**arguments)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises, for the student to read
        text = f"error: {type(error).__name__}: {error}"
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."


def call_reward(path: str, prompt: str, completion: str, columns: dict[str, Any]) -> float:
    """Return what a reward function returns; raise RolloutError, which can leave the process, for what it raises."""
    try:
        value = load_object(path, "a reward")(prompt, completion, columns)
    except Exception as error:
        raise RolloutError(f"reward {path} failed: {type(error).__name__}: {error}") from error
    try:
        reward = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        reward = math.nan
    if not math.isfinite(reward):
        raise RolloutError(f"reward {path} returned {value!r}; expected a finite number")
    return reward
