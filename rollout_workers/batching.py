"""Groups finished trajectories into batches, which leave a worker when they are full or have waited for long."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generic, TypeVar

from rollout_workers.contexts.groups import Attempt, GroupBarrier, Released

# Of the time since the rollout began, the share that a finished trajectory waits for its batch to fill. A rollout's
# last completions come one by one, and teacher and learner could read them meanwhile; yet each batch costs every stage
# a call, so the waits grow with the rollout, and the number of batches that leave early with its logarithm.
PATIENCE = 0.25
MIN_PATIENCE_SECONDS = 0.01
BEHIND_SECONDS = 0.05  # an idle driver requests a rollout's next batch within a few milliseconds
MAX_GROWTH = 4

Task = asyncio.Task[Attempt]
Row = TypeVar("Row")


@dataclass
class BatchSize:
    """Says how many rows fill a batch: more while the driver is behind, for a batch costs it the same at any size.

    Example:
        >>> size = BatchSize(8)
        >>> size.adapt(seconds=0.3, num_waiting=8)
        >>> size.rows
        16
        >>> size.adapt(seconds=0.002, num_waiting=16)
        >>> size.rows
        8
    """

    configured: int
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.configured

    def adapt(self, seconds: float, num_waiting: int) -> None:
        """Note how long after a batch the next one was requested, and how many rows had finished by then."""
        if seconds <= BEHIND_SECONDS:
            self.rows = max(self.configured, self.rows // 2)
        elif num_waiting >= self.rows:
            self.rows = min(MAX_GROWTH * self.configured, 2 * self.rows)


class Filling(Generic[Row]):
    """Collects the finished rows of a rollout into batches; takes the time as an argument and waits for nothing.

    Example:
        >>> filling = Filling[int](num_rows=3, rows_per_batch=2, started=0.0)
        >>> filling.add("teacher", 7, now=1.0), filling.due_at
        (None, 1.25)
        >>> filling.add("teacher", 8, now=1.1)
        [7, 8]
    """

    def __init__(self, num_rows: int, rows_per_batch: int, started: float) -> None:
        self.missing = num_rows
        self.rows_per_batch = rows_per_batch
        self._started = started
        self._pending: dict[str, list[Row]] = {}
        self._due: dict[str, float] = {}  # when a teacher's rows leave though they are few

    @property
    def due_at(self) -> float | None:
        """Return when the first rows leave, few as they are; None where none wait."""
        return min(self._due.values(), default=None)

    def add(self, teacher: str, row: Row, now: float) -> list[Row] | None:
        """Take a row, and return a batch if that fills it and further rows are missing."""
        self.missing -= 1
        rows = self._pending.setdefault(teacher, [])
        rows.append(row)
        self._due.setdefault(teacher, now + max(MIN_PATIENCE_SECONDS, PATIENCE * (now - self._started)))
        if not self.missing or len(rows) < self.rows_per_batch:
            return None
        del self._due[teacher]
        return self._pending.pop(teacher)

    def overdue(self) -> list[Row]:
        teacher = min(self._due, key=self._due.__getitem__)
        del self._due[teacher]
        return self._pending.pop(teacher)

    def rest(self) -> list[list[Row]]:
        """Return the last batches, when no row is missing."""
        return list(self._pending.values())


async def in_batches(
    tasks: Sequence[Task], size: BatchSize, barrier: GroupBarrier
) -> AsyncIterator[tuple[list[Released], bool]]:
    """Yield what the tasks, at least one, return, in the order in which the barrier releases it.

    All rows of a batch are for the same teacher; with each batch comes whether nothing follows. Each request for a
    batch tells `size` how fast they are taken.
    """
    finished: asyncio.Queue[Task] = asyncio.Queue()
    for task in tasks:
        task.add_done_callback(finished.put_nowait)
    filling = Filling[Released](len(tasks), size.rows, started=perf_counter())
    while filling.missing:
        for rows in await _next_batches(finished, filling, barrier):
            yielded = perf_counter()
            yield rows, False
            size.adapt(perf_counter() - yielded, finished.qsize())
            filling.rows_per_batch = size.rows
    *others, last = filling.rest()
    for rows in others:
        yield rows, False
    yield last, True


async def _next_batches(
    finished: asyncio.Queue[Task], filling: Filling[Released], barrier: GroupBarrier
) -> list[list[Released]]:
    """Wait for a task or for a time that is due, and return the batches that leave then, if any."""
    due = [time for time in (filling.due_at, barrier.due_at) if time is not None]
    done = await _next(finished, min(due, default=None))
    now = perf_counter()
    released = barrier.overdue(now) if done is None else barrier.add(done.result(), now)
    full = [filling.add(attempt.trajectory.teacher, (attempt, group), now) for attempt, group in released]
    batches = [rows for rows in full if rows]
    if done is None and filling.missing and filling.due_at is not None and filling.due_at <= now:
        batches.append(filling.overdue())
    return batches


async def _next(finished: asyncio.Queue[Task], until: float | None) -> Task | None:
    """Return the next finished task, or None when it is `until` on the clock of `perf_counter`."""
    if not finished.empty():
        return finished.get_nowait()
    try:
        async with asyncio.timeout(None if until is None else max(0.0, until - perf_counter())):
            return await finished.get()
    except TimeoutError:
        return None
