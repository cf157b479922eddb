"""An engine that writes several sequences at a time, each at the pace that their number allows."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from cluster.planning.rates import pace
from cluster.planning.simulated_time import SimulatedTime

ROUNDING_TOKENS = 1e-6  # by which sums of fractions of tokens may be off


@dataclass(frozen=True)
class _Sequence:
    num_tokens: int
    done: Callable[[], None]


class Decoding:
    """Runs what fits, those of the lowest priority first and among them the first to come.

    All running sequences advance together: one that began when the engine's `progress` was p is finished when it has
    reached p plus its length. So an event is planned for the next one to finish only.
    """

    def __init__(self, time: SimulatedTime, points: Sequence[tuple[int, float]], most_running: int) -> None:
        """Take the clock, seconds per token by the number of running sequences, and the most of them."""
        self._time = time
        self._points = points
        self._most_running = most_running
        self._running: list[tuple[float, int, _Sequence]] = []  # by the progress at which they finish
        self._waiting: list[tuple[int, int, _Sequence]] = []  # by priority, then arrival
        self._order = count()
        self._progress = 0.0  # tokens of a sequence that has run since the beginning
        self._looked_at = 0.0
        self._num_plans = 0
        self._paused_until = 0.0
        self.busy_seconds = 0.0  # in which something was written

    def write(self, num_tokens: int, priority: int, done: Callable[[], None]) -> None:
        """Begin a sequence, now or when there is room; `done` is called when it is finished."""
        self._advance()
        heapq.heappush(self._waiting, (priority, next(self._order), _Sequence(num_tokens, done)))
        self._go_on()

    def pause(self, seconds: float) -> None:
        """Write nothing for a while."""
        self._advance()
        self._paused_until = self._looked_at = self._time.now + seconds
        self._go_on()

    def _advance(self) -> None:
        """Add what was written since the last look."""
        seconds = max(0.0, self._time.now - self._looked_at)
        if self._running:
            self._progress += seconds / pace(self._points, len(self._running))
            self.busy_seconds += seconds
        self._looked_at = max(self._looked_at, self._time.now)

    def _go_on(self) -> None:
        """Let in what fits, and plan for the next sequence to finish."""
        while self._waiting and len(self._running) < self._most_running:
            _, order, sequence = heapq.heappop(self._waiting)
            heapq.heappush(self._running, (self._progress + sequence.num_tokens, order, sequence))
        if self._running:
            self._num_plans += 1
            seconds = (self._running[0][0] - self._progress) * pace(self._points, len(self._running))
            at = max(self._time.now, self._paused_until) + max(0.0, seconds)
            self._time.at(at, partial(self._finish, self._num_plans))

    def _finish(self, plan: int) -> None:
        if plan != self._num_plans:  # something changed since
            return
        self._advance()
        # After so many seconds that the clock cannot tell this moment from the last, nothing would have been written.
        self._progress = max(self._progress, self._running[0][0])
        finished = []
        while self._running and self._running[0][0] <= self._progress + ROUNDING_TOKENS:
            finished.append(heapq.heappop(self._running)[2])
        self._go_on()
        for sequence in finished:
            sequence.done()
