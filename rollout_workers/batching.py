"""When finished trajectories leave a worker: as full batches, or before they have waited for long."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import perf_counter

from cluster.contracts.trajectory import GeneratedTrajectory

# Of the time since the rollout began, the share that a finished trajectory waits for its batch to fill. A rollout's
# last completions come one by one, and teacher and learner could read them meanwhile; yet each batch costs every stage
# a call, so the waits grow with the rollout, and the number of batches that leave early with its logarithm.
PATIENCE = 0.25
MIN_PATIENCE_SECONDS = 0.01

Task = asyncio.Task[GeneratedTrajectory]


async def in_batches(
    tasks: Sequence[Task], rows_per_batch: int
) -> AsyncIterator[tuple[list[GeneratedTrajectory], bool]]:
    """Yield what the tasks return, in the order in which they finish, and whether nothing follows.

    Args:
        tasks: at least one.
        rows_per_batch: the most rows of a batch; all of them are for the same teacher.
    """
    finished: asyncio.Queue[Task] = asyncio.Queue()
    for task in tasks:
        task.add_done_callback(finished.put_nowait)
    started = perf_counter()
    pending: dict[str, list[GeneratedTrajectory]] = {}
    due: dict[str, float] = {}  # when a teacher's rows leave though they are few
    missing = len(tasks)
    while missing:
        done = await _next(finished, min(due.values(), default=None))
        if done is None:
            teacher = min(due, key=due.__getitem__)
            del due[teacher]
            yield pending.pop(teacher), False
            continue
        missing -= 1
        row = done.result()
        rows = pending.setdefault(row.teacher, [])
        rows.append(row)
        now = perf_counter()
        due.setdefault(row.teacher, now + max(MIN_PATIENCE_SECONDS, PATIENCE * (now - started)))
        if missing and len(rows) == rows_per_batch:
            del due[row.teacher]
            yield pending.pop(row.teacher), False
    last = list(pending)[-1]
    for teacher, rows in pending.items():
        yield rows, teacher == last


async def _next(finished: asyncio.Queue[Task], until: float | None) -> Task | None:
    """Return the next finished task, or None when it is `until` on the clock of `perf_counter`."""
    if not finished.empty():
        return finished.get_nowait()
    try:
        async with asyncio.timeout(None if until is None else max(0.0, until - perf_counter())):
            return await finished.get()
    except TimeoutError:
        return None
