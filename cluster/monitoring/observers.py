"""Notifies observers of every step: metrics, lengths of trajectories, calls to workers, pools."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Literal, Protocol

from cluster.contracts.batches import PoolState, Span
from cluster.contracts.errors import RunStopped
from cluster.contracts.files import Record

Ending = Literal["ended", "stopped", "failed"]

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class StepSample:
    """Holds one step as the driver saw it."""

    record: Record
    completion_lengths: Sequence[int]  # of every trajectory that it learned from
    spans: Sequence[Span]  # calls that were answered since the step before
    pools: Sequence[PoolState]

    @property
    def step(self) -> int:
        return int(self.record["step"])


class StepObserver(Protocol):
    """Receives every step in order, and the end."""

    def on_step(self, sample: StepSample) -> None:
        """Take in one step, without waiting."""

    def close(self, ending: Ending) -> None:
        """Bring everything to where it belongs."""


class Observers:
    """Holds all observers of a run."""

    def __init__(self, observers: Sequence[StepObserver]) -> None:
        self._observers = list(observers)

    def on_step(self, sample: StepSample) -> None:
        """Pass a step to every observer; one that cannot write is dropped, since the run can go on without it."""
        for observer in list(self._observers):
            self._notify(observer, partial(observer.on_step, sample))

    def close(self, error: BaseException | None) -> None:
        """Pass on how the run ended, which raised the error if there is one."""
        for observer in list(self._observers):
            self._notify(observer, partial(observer.close, ending_of(error)))

    def _notify(self, observer: StepObserver, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            _log.warning("%s: %s; the run goes on without it", type(observer).__name__, error)
            self._observers.remove(observer)


def ending_of(error: BaseException | None) -> Ending:
    """Return how a run ended that raised this.

    Example:
        >>> ending_of(None), ending_of(KeyboardInterrupt()), ending_of(ValueError())
        ('ended', 'stopped', 'failed')
    """
    if error is None:
        return "ended"
    return "stopped" if isinstance(error, RunStopped | KeyboardInterrupt) else "failed"


class PoolMetrics:
    """Turns the calls since the last step into metrics of each pool.

    A worker is busy from being called until it answers. A call counts when it is answered, and no moment of a worker
    counts twice, however many calls overlap.

    Example:
        >>> clock = iter((0.0, 10.0))
        >>> pool_metrics = PoolMetrics(lambda: next(clock))
        >>> calls = [Span("rollout", "rollout-0", "generate", 0.0, 4.0, 1, 20), Span("rollout", "rollout-0", "generate",
        ...          2.0, 5.0, 1, 30)]
        >>> metrics = pool_metrics.measure(calls, [PoolState("rollout", ["rollout-0"], 1, 0)])
        >>> metrics["pool/rollout/busy_share"], metrics["pool/rollout/tokens_per_second"]
        (0.5, 5.0)
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._measured_at = clock()
        self._counted_until: dict[tuple[str, str], float] = {}  # of each worker in each pool; slots share theirs

    def measure(self, spans: Sequence[Span], pools: Iterable[PoolState]) -> dict[str, float]:
        now = self._clock()
        window, self._measured_at = now - self._measured_at, now
        metrics: dict[str, float] = {}
        for pool in pools:
            own = [span for span in spans if span.pool == pool.name]
            busy_share = min(1.0, self._busy_seconds(own) / window / max(1, pool.num_wanted))
            values: dict[str, float] = {
                "busy_share": busy_share,
                "idle_share": 1 - busy_share,
                "serving": len(pool.serving),
                "wanted": pool.num_wanted,
                "restarts": pool.num_restarts,
            }
            if any(span.num_rows for span in own):  # a learner's answers are about no batch of their own
                values["tokens_per_second"] = sum(span.num_tokens for span in own) / window
            metrics |= {f"pool/{pool.name}/{name}": value for name, value in values.items()}
        return metrics

    def _busy_seconds(self, spans: Iterable[Span]) -> float:
        total = 0.0
        for span in sorted(spans, key=lambda span: span.began):
            until = self._counted_until.get((span.pool, span.worker), 0.0)
            total += max(0.0, span.ended - max(span.began, until))
            self._counted_until[span.pool, span.worker] = max(until, span.ended)
        return total
