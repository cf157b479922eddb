"""A run without Ray: rows are written, scored and learned from as engines of given rates would, queue by queue.

It follows every completion and every batch, so what it takes is not what the balancer's formula says.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from cluster.contracts.batches import BatchHandle, Span

ROWS_PER_BATCH = 8
MEASURED_STEPS = 20


@dataclass(frozen=True)
class Load:
    """What every step asks for, and how fast the engines are."""

    rows: int = 96
    median_length: float = 100.0
    sigma: float = 0.6
    longest: int = 1000
    seconds_per_token: float = 0.01
    seconds_per_running: float = 0.0  # that each running completion adds to a token's seconds of all of its worker
    slots: int = 8  # completions that a rollout worker writes at a time
    score_tokens_per_second: float = 2000.0  # of each teacher's replicas
    learn_tokens_per_second: float = 20000.0
    sync_seconds: float = 0.1
    shares: tuple[float, ...] = (1.0,)  # of the rows, by teacher: teachers.0, teachers.1, ...
    score_rates: tuple[float, ...] = ()  # by teacher, instead of the one above


@dataclass
class Simulation:
    """Does steps, strictly on-policy, at any split."""

    load: Callable[[int], Load]  # by step
    seed: int = 0
    noise: float = 0.0  # standard deviation of the logarithm of every step's speed
    clock: float = 0.0

    def step(self, number: int, sizes: dict[str, int]) -> tuple[dict[str, float], list[BatchHandle]]:
        """Return a step's record and batches."""
        load = self.load(number)
        random = np.random.default_rng((self.seed, number))
        speed = float(np.exp(self.noise * random.normal()))
        lengths = np.clip(load.median_length * np.exp(load.sigma * random.normal(size=load.rows)), 1, load.longest)
        written = _write(load, [int(length) for length in lengths], sizes["rollout"], load.seconds_per_token / speed)
        routes = random.choice(len(load.shares), size=len(written), p=np.array(load.shares) / sum(load.shares))
        scored = _score(load, written, [int(route) for route in routes], sizes, speed)
        learned = _learn(scored, load.learn_tokens_per_second * speed)
        tokens = sum(sum(batch.lengths) for batch in scored)
        seconds = learned + load.sync_seconds
        record = {
            "step": float(number),
            "step/seconds": seconds,
            "learn/seconds": tokens / load.learn_tokens_per_second / speed,
            "sync/seconds": load.sync_seconds,
        }
        handles = [batch.handle(self.clock) for batch in scored]
        self.clock += seconds
        return record, handles


@dataclass(frozen=True)
class _Batch:
    worker: int
    lengths: tuple[int, ...]
    asked: float
    written: float
    teacher: int = 0
    replica: int = 0
    scored: float = 0.0

    def handle(self, since: float) -> BatchHandle:
        rows, tokens, teacher = len(self.lengths), sum(self.lengths), f"teacher-{self.teacher}"
        asked, written, scored = (since + moment for moment in (self.asked, self.written, self.scored))
        spans = (
            Span("rollout", f"rollout-{self.worker}", "generate", asked, written, rows, tokens),
            Span(teacher, f"{teacher}-{self.replica}", "score", written, scored, rows, tokens),
        )
        return BatchHandle(None, str(self.teacher), tuple(range(rows)), self.lengths, self.lengths, spans=spans)


def _write(load: Load, lengths: Sequence[int], num_workers: int, seconds_per_token: float) -> list[_Batch]:
    batches = []
    for worker in range(num_workers):
        finished = _decode(load, lengths[worker::num_workers], seconds_per_token)
        asked, waiting = 0.0, list[tuple[float, int]]()
        for end, length in sorted(finished):
            late = waiting and end > 1.25 * waiting[0][0]
            if late or len(waiting) == ROWS_PER_BATCH:
                batches.append(_batch(worker, waiting, asked))
                asked, waiting = waiting[-1][0], []
            waiting.append((end, length))
        if waiting:
            batches.append(_batch(worker, waiting, asked))
    return sorted(batches, key=lambda batch: batch.written)


def _decode(load: Load, lengths: Sequence[int], seconds_per_token: float) -> list[tuple[float, int]]:
    """Return when each completion of a worker ends, and its tokens; what does not fit waits for a place."""
    waiting, running = list(reversed(lengths)), list[tuple[int, int]]()  # decoding step of its last token, tokens
    now, steps = 0.0, 0
    finished = []
    while waiting or running:
        while waiting and len(running) < load.slots:
            length = waiting.pop()
            heapq.heappush(running, (steps + length, length))
        speed = load.seconds_per_running / load.seconds_per_token
        last, length = heapq.heappop(running)
        now += (last - steps) * seconds_per_token * (1 + speed * (len(running) + 1))
        steps = last
        finished.append((now, length))
    return finished


def _batch(worker: int, rows: list[tuple[float, int]], asked: float) -> _Batch:
    return _Batch(worker, tuple(length for _, length in rows), asked, rows[-1][0])


def _score(
    load: Load, batches: Sequence[_Batch], routes: Sequence[int], sizes: dict[str, int], speed: float
) -> list[_Batch]:
    free = {name: [0.0] * size for name, size in sizes.items()}
    rates = load.score_rates or (load.score_tokens_per_second,) * len(load.shares)
    scored = []
    for batch, route in zip(batches, routes, strict=True):
        replicas = free[f"teachers.{route}"]
        replica = replicas.index(min(replicas))
        replicas[replica] = max(replicas[replica], batch.written) + sum(batch.lengths) / rates[route] / speed
        scored.append(replace(batch, teacher=route, replica=replica, scored=replicas[replica]))
    return sorted(scored, key=lambda batch: batch.scored)


def _learn(batches: Sequence[_Batch], tokens_per_second: float) -> float:
    now = 0.0
    for batch in batches:
        now = max(now, batch.scored) + sum(batch.lengths) / tokens_per_second
    return now


def best_split(load: Load, splits: Sequence[dict[str, int]]) -> tuple[dict[str, int], float]:
    """Return the split with the least mean seconds, and those."""
    return min(((sizes, seconds_at(load, sizes)) for sizes in splits), key=lambda found: found[1])


def seconds_at(load: Load, sizes: dict[str, int]) -> float:
    """Return the mean seconds of a step at a split."""
    return _mean_seconds(load, tuple(sizes.items()))


@cache
def _mean_seconds(load: Load, sizes: tuple[tuple[str, int], ...]) -> float:
    run = Simulation(lambda _: load)
    return sum(run.step(step, dict(sizes))[0]["step/seconds"] for step in range(MEASURED_STEPS)) / MEASURED_STEPS
