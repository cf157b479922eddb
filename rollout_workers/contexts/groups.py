"""Holds finished completions until the others of their prompt, which their teacher's context shows, are there too."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import RolloutRequest
from cluster.contracts.trajectory import GeneratedTrajectory


@dataclass(frozen=True)
class Attempt:
    """Holds a finished episode, and what a context may show of it."""

    trajectory: GeneratedTrajectory  # its last row
    text: str = ""  # of its last turn, as the verifier reads it
    feedback: str = ""  # of the environment
    earlier: tuple[GeneratedTrajectory, ...] = ()  # its rows before the last
    metrics: Metrics = field(default_factory=dict)  # of how it came about


Released = tuple[Attempt, Sequence[Attempt]]  # with all finished attempts of its prompt, in the order of the samples


@dataclass
class _Group:
    size: int
    attempts: list[Attempt] = field(default_factory=list)
    waiting: list[Attempt] = field(default_factory=list)
    due_at: float | None = None  # None: none waits

    def release(self) -> list[Released]:
        self.attempts.sort(key=lambda attempt: attempt.trajectory.sample_index)
        released, self.waiting, self.due_at = self.waiting, [], None
        return [(attempt, tuple(self.attempts)) for attempt in released]


class GroupBarrier:
    """Releases every attempt once; takes the time as an argument and waits for nothing.

    An attempt waits until all requests of its prompt are finished, or for `wait_seconds` after the first of those that
    wait. What a worker that died had is requested anew of another, which then waits for these requests alone.

    Example:
        >>> from tests.builders import make_trajectory
        >>> requests = [RolloutRequest(trajectory, 0, trajectory, seed=0) for trajectory in (0, 1)]
        >>> first, second = (Attempt(make_trajectory(sample_index=sample)) for sample in (0, 1))
        >>> barrier = GroupBarrier(requests, wait_seconds=5, waits=lambda route: True)
        >>> barrier.add(first, now=1.0), barrier.due_at
        ([], 6.0)
        >>> [attempt.trajectory.sample_index for attempt, _ in barrier.add(second, now=2.0)]
        [0, 1]
    """

    def __init__(self, requests: Iterable[RolloutRequest], wait_seconds: float, waits: Callable[[str], bool]) -> None:
        """Take the requests of one call to a worker; `waits` says of which routes the completions do."""
        self._wait_seconds, self._waits = wait_seconds, waits
        self._groups: dict[int, _Group] = {}
        for request in requests:
            self._groups.setdefault(request.prompt_id, _Group(0)).size += 1

    @property
    def due_at(self) -> float | None:
        """Return when the first group is released though attempts are missing; None where none waits."""
        return min((group.due_at for group in self._groups.values() if group.due_at is not None), default=None)

    def add(self, attempt: Attempt, now: float) -> list[Released]:
        group = self._groups[attempt.trajectory.prompt_id]
        group.attempts.append(attempt)
        group.waiting.append(attempt)
        if not self._waits(attempt.trajectory.teacher) or len(group.attempts) == group.size:
            return group.release()
        if group.due_at is None:
            group.due_at = now + self._wait_seconds
        return []

    def overdue(self, now: float) -> list[Released]:
        """Release the groups whose time is over, with the attempts that are there."""
        late = [group for group in self._groups.values() if group.due_at is not None and group.due_at <= now]
        return [released for group in late for released in group.release()]
