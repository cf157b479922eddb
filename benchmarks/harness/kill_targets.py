"""Which processes of a run there are to kill."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
from psutil import Process

from benchmarks.harness.process_trees import descendants
from cluster.nodes import start_preloaded

DRIVER = "driver"
APPEAR_SECONDS = 180.0  # in which a process that is being started again must be there
CHECK_SECONDS = 0.2


def _is_actor(name: str) -> Callable[[Process], bool]:
    return lambda process: process.cmdline()[:1] == [name] or process.cmdline()[0].startswith(f"{name}.")


def _is_engine_of(name: str) -> Callable[[Process], bool]:
    is_owner = _is_actor(name)
    return lambda process: _is_engine(process.cmdline()) and is_owner(process.parent())


def _is_engine(command: Sequence[str]) -> bool:
    """Recognise an engine, or the stand-in of one that was forked elsewhere and ends with it."""
    return command[0].startswith("VLLM::EngineCore") or (
        any(part.endswith(Path(start_preloaded.__file__).name) for part in command)
        and any("multiprocessing.spawn" in part for part in command)
    )


KINDS: Mapping[str, Callable[[Process], bool]] = {
    "rollout actor": _is_actor("ray::RolloutActor"),
    "rollout engine": _is_engine_of("ray::RolloutActor"),
    "teacher actor": _is_actor("ray::TeacherActor"),
    "teacher engine": _is_engine_of("ray::TeacherActor"),
    "learner rank": _is_actor("ray::LearnerActor"),
}


def shares(num_kills: int, chance: random.Random) -> list[str]:
    """Return who is to die, in a random order: every kind about as often.

    Example:
        >>> sorted(shares(6, random.Random(1)))
        ['driver', 'learner rank', 'rollout actor', 'rollout engine', 'teacher actor', 'teacher engine']
    """
    kinds = [*KINDS, DRIVER]
    chosen = [kinds[index % len(kinds)] for index in range(num_kills)]
    chance.shuffle(chosen)
    return chosen


def find(kind: str, driver: int) -> list[Process]:
    """Return the processes of a kind that descend from a driver."""
    found = []
    for process in descendants(driver):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and KINDS[kind](process):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError, AttributeError):
            continue  # it ended while it was looked at
    return found


def kill(kind: str, driver: int, chance: random.Random) -> int:
    """Kill one process of a kind, waiting for one to appear, and return how many died: 0 when the driver is gone."""
    deadline = time.monotonic() + APPEAR_SECONDS
    while time.monotonic() < deadline and psutil.pid_exists(driver):
        targets: Sequence[Process] = find(kind, driver)
        if targets:
            try:
                chance.choice(targets).kill()
            except psutil.NoSuchProcess:
                continue
            return 1
        time.sleep(CHECK_SECONDS)
    return 0
