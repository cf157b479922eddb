"""A clock that jumps from event to event, and a cluster whose actors answer on that clock."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from cluster.actors.cluster import Arguments, Cluster, Options


class SimulatedReference:
    """Stands for an answer that a simulated actor gives at some simulated time."""

    def __init__(self, time: "SimulatedTime") -> None:
        self._time = time
        self.is_ready = False
        self.value: Any = None

    def resolve(self, value: Any = None) -> None:
        self.value, self.is_ready = value, True
        self._time.num_resolved += 1


class SimulatedTime:
    """Does events in the order of their time, those of equal time in the order in which they were planned.

    Time passes while the driver waits or works, and at no other moment.

    Example:
        >>> time = SimulatedTime()
        >>> reference = time.reference()
        >>> time.at(2.5, lambda: reference.resolve("done"))
        >>> [ready] = time.run_until_ready([reference], num_returns=1)
        >>> ready.value, time.now
        ('done', 2.5)
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.num_resolved = 0  # references, in all
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(moment, self.now), next(self._order), event))

    def reference(self) -> SimulatedReference:
        return SimulatedReference(self)

    def spend(self, seconds: float) -> None:
        """Let time pass in which the driver itself works."""
        self._run(lambda: False, self.now + seconds)

    def run_until_ready(
        self, references: Sequence[SimulatedReference], num_returns: int, until: float | None = None
    ) -> list[SimulatedReference]:
        """Let time pass until so many references are ready, or until a moment, and return so many that are."""
        self._run(lambda: sum(reference.is_ready for reference in references) >= num_returns, until)
        return [reference for reference in references if reference.is_ready][:num_returns]

    def _run(self, is_enough: Callable[[], bool], until: float | None) -> None:
        """Do events until it is enough, which only a resolved reference can change, or up to a moment."""
        num_resolved = -1
        while True:
            if self.num_resolved != num_resolved:
                num_resolved = self.num_resolved
                if is_enough():
                    return
            if until is not None and (not self._events or self._events[0][0] > until):
                self.now = until
                return
            assert self._events, "the driver waits for an answer that no event is going to give"
            self.now, _, event = heapq.heappop(self._events)
            event()


class SimulatedCluster(Cluster):
    """Makes simulated workers in place of the run's actors; no wait takes too long.

    `actors` makes the simulated worker of an actor class, from the actor's name and its constructor's arguments.
    """

    def __init__(self, time: SimulatedTime, seconds_per_call: float, actors: Mapping[str, Callable[..., Any]]) -> None:
        self._time = time
        self._seconds_per_call = seconds_per_call
        self._actors = actors
        self.workers: dict[str, Any] = {}  # by the names of their actors

    def create(self, actor_class: str, names: Sequence[str], arguments: Arguments, options: Options) -> list[Any]:
        for name, argument in zip(names, arguments, strict=True):
            self.workers[name] = self._actors[actor_class](name, *argument)
        return [SimulatedHandle(self._time, self.workers[name], self._seconds_per_call) for name in names]

    def put(self, value: Any) -> SimulatedReference:
        reference = self._time.reference()
        reference.resolve(value)
        return reference

    def get(self, references: Any, timeout_seconds: float, waiting_for: str, names: Sequence[str] = ()) -> Any:
        pending = references if isinstance(references, list) else [references]
        self._time.run_until_ready(pending, len(pending))
        values = [reference.value for reference in pending]
        return values if isinstance(references, list) else values[0]

    def wait(self, references: Sequence[Any], num_returns: int, timeout_seconds: float) -> list[Any]:
        """Return references that are ready; with a timeout of 0 no time passes, with any other enough of it."""
        return self._time.run_until_ready(references, num_returns, None if timeout_seconds else self._time.now)

    def is_dead(self, answer: Any) -> bool:
        """Return False: simulated workers do not die."""
        return False

    def kill(self, actor: Any) -> None:
        """End nothing."""


class SimulatedHandle:
    """Stands for a worker as an actor handle does; each call takes the driver `seconds_per_call`."""

    def __init__(self, time: SimulatedTime, worker: Any, seconds_per_call: float) -> None:
        self._time, self._seconds_per_call = time, seconds_per_call
        self.worker = worker

    def __getattr__(self, method: str) -> "_Method":
        return _Method(partial(self._call, getattr(self.worker, method)))

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        self._time.spend(self._seconds_per_call)
        return method(*args)


class _Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call

    def options(self, num_returns: int) -> "_Method":
        return self
