"""Decides whether a worker that died is started again, and after how long."""

import re
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

from cluster.contracts.errors import ActorDiedError, ActorError, ModelError, PreceptorError

FIRST_DELAY_SECONDS = 1.0  # before the second restart in a row; the first one needs none
LONGEST_DELAY_SECONDS = 60.0
# Errors of code that is not there. Others may be gone after a restart, such as those of a lack of memory.
INCURABLE = re.compile(r"(\w+\.)*(NotImplementedError|ImportError|ModuleNotFoundError)\b")
VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")  # process ids, addresses and bytes in what is the same error otherwise


@dataclass(frozen=True)
class RestartLimit:
    """Restarts that each replica has."""

    max_restarts: int  # within the window
    window_seconds: float


class RestartBudget:
    """Counts the restarts of each replica, delays those of a replica that dies again and again, and refuses vain ones.

    A restart is vain when a replica that has done nothing since it started dies of the same error as before, or of one
    that no restart can cure. A replica that was killed printed no error, and is always started again.
    """

    def __init__(self, limit: RestartLimit, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._spent: defaultdict[int, deque[float]] = defaultdict(deque)  # replica -> when it was started again
        self._errors: dict[int, str] = {}  # replica -> what it died of last, if it has done nothing since
        self._proven: set[int] = set()  # replicas that have done something since they started

    def note_progress(self, replica: int) -> None:
        """Note that a replica has done some of its work."""
        self._proven.add(replica)
        self._errors.pop(replica, None)

    def take(self, replica: int, name: str, error: PreceptorError) -> float:
        """Take the restart of a replica, called `name`, that ended with this error; return the seconds to wait before.

        Raises:
            ActorError: it is in vain, or none is left.
        """
        reason = self._vain(replica, error)
        delay = None if reason else self.spend(replica)
        if delay is None:
            limit = self._limit
            none_left = (
                f"has no restart left of the {limit.max_restarts} that ray.max_restarts allows within "
                f"{limit.window_seconds:.0f} s"
            )
            raise ActorError(f"{error}; {name} {reason or none_left}") from error
        return delay

    def spend(self, replica: int) -> float | None:
        """Count one restart of a replica and return the seconds to wait before it; None when none is left.

        Example:
            >>> budget = RestartBudget(RestartLimit(max_restarts=3, window_seconds=600), clock=lambda: 0.0)
            >>> [budget.spend(0), budget.spend(0), budget.spend(0), budget.spend(0), budget.spend(1)]
            [0.0, 1.0, 2.0, None, 0.0]
        """
        now, spent = self._clock(), self._spent[replica]
        while spent and spent[0] <= now - self._limit.window_seconds:
            spent.popleft()
        if len(spent) >= self._limit.max_restarts:
            return None
        delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** (len(spent) - 1)) if spent else 0.0
        spent.append(now)
        return delay

    def _vain(self, replica: int, error: PreceptorError) -> str:
        """Return why a restart would be in vain; "": it may help."""
        is_proven = replica in self._proven
        self._proven.discard(replica)
        cause = VARYING.sub("#", _cause(error))
        if not cause:  # killed once, it may still die of the error of before
            return ""
        if not is_proven and INCURABLE.match(cause):
            return "is not started again, for that cures no such error"
        if self._errors.get(replica) == cause:
            return "is not started again, for it died of the same error before, and has done nothing since"
        self._errors[replica] = cause
        return ""


def _cause(error: PreceptorError) -> str:
    """Return what a worker died of, as far as it is the worker's own doing; "" where it is not, or not known to be."""
    if isinstance(error, ActorDiedError):
        return error.last_error
    return str(error) if isinstance(error, ModelError) else ""
