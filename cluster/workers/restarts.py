"""How often, and how soon, what died is started again."""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

FIRST_DELAY_SECONDS = 1.0  # before the second restart in a row; the first one needs none
LONGEST_DELAY_SECONDS = 60.0


@dataclass(frozen=True)
class RestartLimit:
    """Restarts that each replica has."""

    max_restarts: int  # within the window
    window_seconds: float


class RestartBudget:
    """Counts the restarts of each replica, and makes who dies again and again wait longer each time."""

    def __init__(self, limit: RestartLimit, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with all restarts left; `clock` tells seconds."""
        self._limit = limit
        self._clock = clock
        self._spent: defaultdict[int, deque[float]] = defaultdict(deque)  # replica -> when it was started again

    def spend(self, replica: int) -> float | None:
        """Take one restart of a replica and return the seconds to wait before it; None when none is left.

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
