"""Writes a timeline of the workers, in the format that Chrome's tracing page and Perfetto open.

A worker is a process of the timeline. Its calls overlap, since the next batch is requested before the last one is back;
so it has as many threads as it had calls at a time.
"""

import json
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cluster.contracts.batches import Span
from cluster.contracts.files import write_atomically
from cluster.monitoring.observers import Ending, StepSample

MOST_SPANS_PER_STEP = 20_000  # the rest of a step is left out; such a file has about 4 MB per step
FLOW = {"rollout": 0, "learner": 2}  # where pools stand in the flow of data; the teachers at 1


class Trace:
    """Keeps the calls of the first and the last steps, and writes them when the first are over and at the end."""

    def __init__(self, path: Path, num_steps: int) -> None:
        self._path = path
        self._num_steps = num_steps
        self._first: list[list[Span]] = []
        self._last: deque[list[Span]] = deque(maxlen=num_steps)

    def on_step(self, sample: StepSample) -> None:
        spans = list(sample.spans[:MOST_SPANS_PER_STEP])
        spans += [span for pool in sample.pools if pool.name == "rollout" for span in _syncs(spans, pool.serving)]
        if len(self._first) == self._num_steps:
            self._last.append(spans)
            return
        self._first.append(spans)
        if len(self._first) == self._num_steps:
            self._write()

    def close(self, ending: Ending) -> None:
        self._write()

    def _write(self) -> None:
        write_atomically(self._path, json.dumps(timeline(list(chain(*self._first, *self._last)))))


def timeline(spans: Sequence[Span]) -> dict[str, Any]:
    """Return the trace; its time begins with the first call.

    Example:
        >>> span = Span("rollout", "rollout-0", "generate", 7.0, 7.5, num_rows=2, num_tokens=90, lengths=(30, 60))
        >>> event = timeline([span])["traceEvents"][-1]
        >>> event["name"], event["ts"], event["dur"], event["args"]
        ('generate', 0.0, 500000.0, {'rows': 2, 'tokens': 90, 'lengths': (30, 60)})
    """
    by_worker: dict[str, list[Span]] = {}  # teachers of a slot have the same workers
    for span in sorted(spans, key=lambda span: (FLOW.get(span.pool, 1), span.pool, span.worker)):
        by_worker.setdefault(span.worker, []).append(span)
    start = min((span.began for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for process, (worker, calls) in enumerate(by_worker.items(), start=1):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": worker}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}})
        own = sorted(calls, key=lambda span: span.began)
        events += [_event(span, process, lane, start) for span, lane in zip(own, lanes(own), strict=True)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lanes(spans: Iterable[Span]) -> list[int]:
    """Return for each span, in the order in which they began, the first lane that is free then.

    Example:
        >>> times = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0)]
        >>> lanes([Span("p", "w", "score", began, ended) for began, ended in times])
        [0, 1, 0]
    """
    free_at: list[float] = []
    chosen = []
    for span in spans:
        lane = next((lane for lane, end in enumerate(free_at) if end <= span.began), len(free_at))
        free_at[lane : lane + 1] = [span.ended]
        chosen.append(lane)
    return chosen


def _event(span: Span, process: int, lane: int, start: float) -> dict[str, Any]:
    counts = {"rows": span.num_rows, "tokens": span.num_tokens} if span.num_rows else {}
    rollout = {} if span.rollout is None else {"rollout": span.rollout}
    lengths = {"lengths": span.lengths} if span.lengths else {}
    pool = {} if span.worker.startswith(f"{span.pool}-") else {"pool": span.pool}  # of a slot, or of a later checkpoint
    return {
        "ph": "X",
        "name": span.stage,
        "cat": span.stage,
        "pid": process,
        "tid": lane,
        "ts": round((span.began - start) * 1e6, 1),
        "dur": round(span.seconds * 1e6, 1),
        "args": counts | rollout | lengths | pool,
    }


def _syncs(spans: Sequence[Span], workers: Iterable[str]) -> list[Span]:
    """Return the part that rollout workers take in the learner's weight syncs: all at the same time."""
    rank = next((span.worker for span in spans if span.stage == "sync"), None)
    synced = [span for span in spans if span.stage == "sync" and span.worker == rank]
    return [Span("rollout", worker, "sync", span.began, span.ended) for worker in workers for span in synced]
