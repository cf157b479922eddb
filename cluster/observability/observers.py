"""Who is told about every step: the figures, the trajectories' lengths, the calls to workers, the pools."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Protocol, Self

from cluster.contracts.errors import RunStopped
from cluster.contracts.observation import PoolState, Span
from cluster.observability.metric_sinks import Record

Ending = Literal["ended", "stopped", "failed"]

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class SeenStep:
    """One step as the driver saw it."""

    record: Record
    completion_lengths: Sequence[int]  # of every trajectory that it learned from
    spans: Sequence[Span]  # calls that were answered since the step before
    pools: Sequence[PoolState]

    @property
    def step(self) -> int:
        """Return its number, from 1."""
        return int(self.record["step"])


class StepObserver(Protocol):
    """Is told about steps in their order, and about the end."""

    def see(self, seen: SeenStep) -> None:
        """Take in one step; waits for nobody."""

    def close(self, ending: Ending) -> None:
        """Bring everything to where it belongs."""


class Observers:
    """All observers of a run; as a context, it tells them how the run ended."""

    def __init__(self, observers: Sequence[StepObserver]) -> None:
        self._observers = list(observers)

    def see(self, seen: SeenStep) -> None:
        """Tell everybody about a step; who cannot write is told no more, since the run itself can go on without."""
        for observer in list(self._observers):
            self._tell(observer, partial(observer.see, seen))

    def __enter__(self) -> Self:
        """Change nothing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Tell everybody about the end."""
        for observer in list(self._observers):
            self._tell(observer, partial(observer.close, ending_of(error)))

    def _tell(self, observer: StepObserver, what: Callable[[], None]) -> None:
        try:
            what()
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
