"""Runs harnesses in a process of their own, which may be another Python than the worker's; needs no package.

Lines of JSON on the standard input start and cancel episodes, lines on the standard output end them. What harnesses
print goes to the standard error. `HarnessProcess` starts this file by its path.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

END_SECONDS = 5.0  # for harnesses to end what they started


def load(path: str) -> Callable[..., Any]:
    """Return the function at `package.module:name` or `path/to/file.py:name`."""
    place, _, name = path.rpartition(":")
    if not place.endswith(".py"):
        loaded = importlib.import_module(place)
    else:
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules.get(Path(place).stem) or importlib.util.module_from_spec(spec)
        if Path(place).stem not in sys.modules:
            sys.modules[Path(place).stem] = loaded
            spec.loader.exec_module(loaded)
    function: Callable[..., Any] = getattr(loaded, name)
    return function


async def run(harness: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return what an episode of a harness came to: `reward` and `feedback`, or `error`."""
    try:
        function = load(harness)
        if inspect.iscoroutinefunction(function):
            value = await function(**arguments)
        else:
            value = await asyncio.to_thread(function, **arguments)
        return result_of(value)
    except Exception as error:  # noqa: BLE001 - a harness may raise anything, and the worker counts it
        return {"error": f"{type(error).__name__}: {error}"}


def result_of(value: Any) -> dict[str, Any]:
    """Return a harness's value as a result: a number is the reward, None leaves it to the run's verifier."""
    if isinstance(value, dict):
        return {"reward": value.get("reward"), "feedback": str(value.get("feedback") or "")}
    return {"reward": None if value is None else float(value)}


class Episodes:
    """Runs the episodes that the worker asks for, and writes what they come to."""

    def __init__(self, answers: TextIO) -> None:
        self._answers = answers
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def take(self, line: str) -> None:
        """Start the episode that a line asks for, or cancel the one that it only names."""
        asked = json.loads(line)
        number = asked["number"]
        if "harness" in asked:
            self._tasks[number] = asyncio.create_task(self._answer(number, asked))
        elif number in self._tasks:
            self._tasks[number].cancel()

    async def end(self) -> None:
        """Let harnesses end what they started."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=END_SECONDS)
        for module in list(sys.modules.values()):
            if (close := getattr(module, "close_harness", None)) is not None:
                await asyncio.wait_for(close(), END_SECONDS)

    async def _answer(self, number: int, asked: dict[str, Any]) -> None:
        try:
            result = await run(asked["harness"], asked["arguments"])
        finally:
            del self._tasks[number]
        write(self._answers, {"number": number, **result})


def write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


async def serve(answers: TextIO) -> None:
    """Run episodes until the standard input ends."""
    loop, ended, episodes = asyncio.get_running_loop(), asyncio.Event(), Episodes(answers)

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(episodes.take, line)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=read, daemon=True).start()
    write(answers, {})  # ready
    await ended.wait()
    await episodes.end()


def list_tasks(path: str, arguments: dict[str, Any], answers: TextIO) -> None:
    """Write the rows of prompts that a function yields, one a line."""
    for row in load(path)(**arguments):
        write(answers, row)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what others print is no answer
    os.setsid()  # what harnesses start ends with this process
    sys.path[0] = str(Path.cwd())  # in the place of this file's folder
    if len(sys.argv) > 1:
        list_tasks(sys.argv[1], json.loads(sys.argv[2]), answers)
    else:
        asyncio.run(serve(answers))
    answers.flush()
    if len(sys.argv) > 1:
        os._exit(0)
    os.killpg(0, signal.SIGKILL)  # threads and programs of harnesses may still run


if __name__ == "__main__":
    main()
