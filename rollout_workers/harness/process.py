"""Runs harnesses for a rollout worker in one further process, by `program.py`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from cluster.contracts.errors import ConfigError, PromptError, RolloutError

PROGRAM = str(Path(__file__).with_name("program.py"))
VERIFIERS = str(Path(__file__).with_name("verifiers_package.py"))  # plays the environments of that package
START_SECONDS = 120.0
LIST_SECONDS = 600.0
END_SECONDS = 10.0
MAX_LINE_BYTES = 1 << 24


class HarnessProcess:
    """Runs episodes of one harness; the process starts with the first of them, and again after it ended."""

    def __init__(self, harness: str, python: str | None = None, at_once: int = 64) -> None:
        """Take the harness's import path, the Python that runs it (None: the worker's), and how many run at once."""
        self._harness, self._python = harness, python
        self._slots = asyncio.Semaphore(at_once)
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    async def run(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the episode's result, `reward` and `feedback`, or `error`; if cancelled, so is the harness.

        Raises:
            RolloutError: the process does not start.
        """
        async with self._slots:
            await self._ready()
            number = next(self._numbers)
            ended = self._waiting[number] = asyncio.get_running_loop().create_future()
            self._send({"number": number, "harness": self._harness, "arguments": dict(arguments)})
            try:
                return await ended
            except asyncio.CancelledError:
                self._send({"number": number})
                raise
            finally:
                self._waiting.pop(number, None)

    async def shutdown(self) -> None:
        """End the process, which first lets its harnesses end what they started."""
        process, self._process = self._process, None
        if self._reading is not None:
            self._reading.cancel()
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), END_SECONDS)
        except TimeoutError:
            process.kill()

    def _send(self, asked: dict[str, Any]) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.write(json.dumps(asked).encode() + b"\n")

    async def _ready(self) -> None:
        async with self._lock:
            if self._process is not None:
                return
            process = await start(self._python)
            assert process.stdout is not None
            try:
                first = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
            except TimeoutError:
                first = b""
            if not first:
                raise RolloutError(f"the process of harness {self._harness} did not start; its output says why")
            self._process = process
            self._reading = asyncio.create_task(self._read(process, process.stdout))

    async def _read(self, process: asyncio.subprocess.Process, lines: asyncio.StreamReader) -> None:
        """Hand results to those that wait; when the process ends, so do all its episodes."""
        try:
            async for line in lines:
                result = json.loads(line)
                waiting = self._waiting.pop(result.pop("number"), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(result)
        except ValueError:  # a line of more than MAX_LINE_BYTES
            process.kill()
        code = await process.wait()
        if self._process is process:
            self._process = None  # the next episode starts another
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result({"error": f"the process of the harness ended with code {code}"})


async def start(python: str | None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *command_of(python),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
        env=environment_of(python),
    )


def command_of(python: str | None) -> list[str]:
    return [python or sys.executable, PROGRAM]


def environment_of(python: str | None) -> dict[str, str]:
    """Return the variables of the process: the worker's own Python finds there what the worker can import."""
    if python is not None:
        return dict(os.environ)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def list_tasks(function: str, arguments: Mapping[str, Any], python: str | None) -> list[dict[str, Any]]:
    """Return the rows that a function yields in a harness's Python.

    Raises:
        ConfigError: there is no such Python.
        PromptError: the function fails, or takes longer than LIST_SECONDS.
    """
    command = [*command_of(python), function, json.dumps(arguments)]
    try:
        done = subprocess.run(
            command, env=environment_of(python), capture_output=True, text=True, timeout=LIST_SECONDS, check=True
        )
    except OSError as error:
        raise ConfigError(f"environment.python is '{python}', which cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise PromptError(f"listing the tasks takes longer than {LIST_SECONDS:g} s; take fewer of them") from error
    except subprocess.CalledProcessError as error:
        *_, last = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()
        raise PromptError(f"{last}; this runs in {command[0]}, where its packages must be") from error
    return [json.loads(line) for line in done.stdout.splitlines()]
