"""A clock that jumps from event to event, and promises that are kept on it."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

from cluster.actors.calls import Promise


class SimulatedPromise(Promise):
    """What a simulated actor's method returns: a reference to an answer that comes at some simulated time."""

    def __init__(self, time: "SimulatedTime") -> None:
        """Begin without an answer."""
        super().__init__(time)
        self._time = time
        self.is_kept = False
        self.value: Any = None

    def keep(self, value: Any = None) -> None:
        """Answer."""
        self.value, self.is_kept = value, True
        self._time.num_kept += 1


class SimulatedTime:
    """Does events in the order of their time, those of equal time in the order in which they were planned.

    It answers for its promises as Ray does for references, so time passes while somebody waits, and at no other moment.

    Example:
        >>> time = SimulatedTime()
        >>> promise = time.promise()
        >>> time.at(2.5, lambda: promise.keep("done"))
        >>> time.get(promise), time.now
        ('done', 2.5)
    """

    def __init__(self) -> None:
        """Begin at 0 seconds, with no event."""
        self.now = 0.0
        self.num_kept = 0  # promises, in all
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, moment: float, event: Callable[[], None]) -> None:
        """Plan an event, now or later."""
        heapq.heappush(self._events, (max(moment, self.now), next(self._order), event))

    def promise(self) -> SimulatedPromise:
        """Return a promise to be kept later."""
        return SimulatedPromise(self)

    def kept(self, value: Any = None) -> SimulatedPromise:
        """Return a promise that is kept already."""
        promise = self.promise()
        promise.keep(value)
        return promise

    def spend(self, seconds: float) -> None:
        """Let time pass in which the driver itself works."""
        self._run(lambda: False, self.now + seconds)

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """Return the value of a promise, or those of a list, as `ray.get` does; nothing takes too long."""
        asked: list[SimulatedPromise] = list(references) if isinstance(references, list) else [references]
        self._run(lambda: all(promise.is_kept for promise in asked), None)
        values = [promise.value for promise in asked]
        return values if isinstance(references, list) else values[0]

    def wait(
        self, references: Sequence[Any], *, num_returns: int, timeout: float | None
    ) -> tuple[list[Any], list[Any]]:
        """Return promises that are kept, up to `num_returns`, and the others, as `ray.wait` does.

        Nothing takes too long: but for a look without any patience, the wait ends when the promises are kept.
        """
        until = self.now if timeout == 0 else None
        self._run(lambda: len(_kept(references)) >= num_returns, until)
        ready = _kept(references)[:num_returns]
        chosen = set(ready)
        return ready, [promise for promise in references if promise not in chosen]

    def _run(self, is_enough: Callable[[], bool], until: float | None) -> None:
        """Do events until it is enough, which it can only become when a promise is kept, or up to a moment."""
        num_kept = -1
        while True:
            if self.num_kept != num_kept:
                num_kept = self.num_kept
                if is_enough():
                    return
            if until is not None and (not self._events or self._events[0][0] > until):
                self.now = until
                return
            assert self._events, "somebody waits for what nobody is going to do"
            self.now, _, event = heapq.heappop(self._events)
            event()


def _kept(references: Iterable[Any]) -> list[Any]:
    return [promise for promise in references if promise.is_kept]
