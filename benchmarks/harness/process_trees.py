"""What a program and everything that it started have computed, and how to end them."""

from collections.abc import Iterable, Mapping

import psutil
from psutil import Process

END_SECONDS = 20.0  # Ray's daemons follow their driver within a few seconds

CpuSeconds = Mapping[int, float]  # by process id


def descendants(pid: int) -> list[Process]:
    """Return the process and all that descend from it; nothing where it is gone."""
    try:
        root = Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(processes: Iterable[Process]) -> dict[int, float]:
    """Return what each process has computed so far, on all its threads; those that are gone are left out."""
    found = {}
    for process in processes:
        try:
            times = process.cpu_times()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found[process.pid] = times.user + times.system
    return found


def spent(before: CpuSeconds, after: CpuSeconds) -> float:
    """Return the CPU-seconds between two readings; a process that ended in between counts for nothing.

    Example:
        >>> spent({1: 2.0, 2: 5.0}, {1: 3.0, 3: 0.5})
        1.5
    """
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def end(processes: Iterable[Process]) -> None:
    """Wait a little for the processes to end by themselves, then kill those that have not."""
    _, alive = psutil.wait_procs(list(processes), timeout=END_SECONDS)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=END_SECONDS)
