"""Whose turn it is where several teachers share the hardware of one: few switches, and nobody waits for ever.

Pure but for the clock: `time_share.py` does what is decided here. Times count in switches, since a pause that costs
little beside a switch is worth it and one that costs much is not: the embedded models' engines start again in ten
seconds, a large model comes back from host memory in one.
"""

from collections import deque
from collections.abc import Callable, Sequence

# While others wait, a turn that has work goes on this long, so at most one part in eleven of a busy slot's time goes
# into switching.
LONGEST_TURN_SWITCHES = 10.0
# A teacher that has nothing to do keeps its turn so long while others wait: the next completions of the same rollout
# are most often under way to it. Longer pauses would cost more than the switches that they save.
PATIENCE_SWITCHES = 0.25


class Turns:
    """Requests of several teachers, of which those of one at a time run.

    Example:
        >>> times = iter((0.0, 1.0, 2.0, 3.0, 4.0, 9.0, 9.0))
        >>> turns = Turns(["math", "code"], awake="math", switch_seconds=2.0, clock=lambda: next(times))
        >>> turns.arrive("math"), turns.arrive("code"), turns.admit(), turns.due()
        (None, None, 1, None)
        >>> turns.finish(), turns.due()
        (None, 'code')
    """

    def __init__(self, teachers: Sequence[str], awake: str, switch_seconds: float, clock: Callable[[], float]) -> None:
        """Begin with the turn of `awake`, whose engine runs.

        Args:
            teachers: all names.
            awake: one of them.
            switch_seconds: what a switch will take, until one has been seen.
            clock: seconds.
        """
        self.awake = awake
        self._clock = clock
        self._waiting: dict[str, deque[float]] = {teacher: deque() for teacher in teachers}  # times of arrival
        self._began = self._idle_since = clock()
        self._rested_since = dict.fromkeys(teachers, self._began)  # when each teacher's last turn ended
        self._num_running = 0
        self._has_run = False  # in the present turn; one in which nothing ran would be for nothing
        self._switch_seconds = switch_seconds

    def arrive(self, teacher: str) -> None:
        """Take in a request."""
        self._waiting[teacher].append(self._clock())

    def admit(self) -> int:
        """Return how many waiting requests of the present teacher, the first ones, run from now on."""
        if self._is_over():
            return 0
        waiting = self._waiting[self.awake]
        count = len(waiting)
        waiting.clear()
        self._num_running += count
        self._has_run = self._has_run or count > 0
        return count

    def finish(self) -> None:
        """Note that a running request is done."""
        self._num_running -= 1
        self._idle_since = self._clock()

    def due(self) -> str | None:
        """Return whose engine is to be woken now; None: nobody's."""
        longest_waiting = self._longest_waiting()
        if self._num_running or longest_waiting is None:
            return None
        if self._is_over() or (not self._waiting[self.awake] and self._patience_left() <= 0):
            return longest_waiting
        return None

    def seconds_left(self) -> float | None:
        """Return after how long `due` may say something else though nothing has happened; None: never."""
        if self._num_running or self._longest_waiting() is None:
            return None
        return max(0.0, self._patience_left())

    def switched(self, teacher: str, seconds: float) -> None:
        """Note that a teacher was woken, and how long it took from the end of the turn before."""
        now = self._clock()
        self._rested_since[self.awake] = now - seconds
        self.awake, self._switch_seconds = teacher, seconds
        self._began = self._idle_since = now
        self._has_run = False

    def _waits_since(self, teacher: str) -> float:
        """Return since when a teacher has waited for a turn: its oldest request, or the end of its last turn."""
        return max(self._waiting[teacher][0], self._rested_since[teacher])

    def _longest_waiting(self) -> str | None:
        others = [teacher for teacher, waiting in self._waiting.items() if waiting and teacher != self.awake]
        return min(others, key=self._waits_since, default=None)

    def _is_over(self) -> bool:
        """Tell whether the present turn has lasted as long as others must wait."""
        longest_waiting = self._longest_waiting()
        if longest_waiting is None or not self._has_run:
            return False
        contested_since = max(self._began, self._waits_since(longest_waiting))
        return self._clock() - contested_since >= LONGEST_TURN_SWITCHES * self._switch_seconds

    def _patience_left(self) -> float:
        return self._idle_since + PATIENCE_SWITCHES * self._switch_seconds - self._clock()
