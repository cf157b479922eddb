"""Calls to the ranks of a group that are under way."""

from collections.abc import Iterable, Sequence
from time import perf_counter
from typing import Any

from cluster.contracts.metrics import Metric
from cluster.contracts.observation import Span
from cluster.workers.actors import get_all
from cluster.workers.promises import answers_of


class Calls:
    """Keeps the answers of calls that every rank gets in the same order."""

    def __init__(self, names: Sequence[str], timeout_seconds: float, waiting_for: str) -> None:
        """Say who is called, how long the last answer may take, and what an error says was waited for."""
        self._names = names
        self._timeout_seconds = timeout_seconds
        self._waiting_for = waiting_for
        self._pending: list[tuple[str, Any, float]] = []  # who, reference, when it was asked
        self._answers: list[dict[str, Metric]] = []
        self.spans: list[Span] = []  # of the calls whose answers were taken

    def add(self, references: Iterable[Any]) -> None:
        """Take the references of one call to each rank, in their order."""
        now = perf_counter()
        self._pending += [(name, called, now) for name, called in zip(self._names, references, strict=True)]

    @property
    def pending(self) -> list[Any]:
        """Return the references whose answers were not taken yet."""
        return [reference for _, reference, _ in self._pending]

    def collect(self) -> bool:
        """Take the answers that are there, and say whether none is missing.

        Raises:
            ActorError: a rank died.
            PreceptorError: what a rank raised.
        """
        if self._pending:
            pending = self.pending
            ready = set(answers_of(pending).wait(pending, num_returns=len(pending), timeout=0)[0])
            self._take([call for call in self._pending if call[1] in ready])
            self._pending = [call for call in self._pending if call[1] not in ready]
        return not self._pending

    def answers(self) -> list[dict[str, Metric]]:
        """Return all answers, waiting for those that are missing.

        Raises:
            ActorError: a rank died, or did not answer in time; says which.
            PreceptorError: what a rank raised.
        """
        self._take(self._pending)
        self._pending = []
        return self._answers

    def _take(self, calls: Sequence[tuple[str, Any, float]]) -> None:
        references = [reference for _, reference, _ in calls]
        names = [name for name, _, _ in calls]
        self._answers += get_all(references, self._timeout_seconds, self._waiting_for, names)
        now = perf_counter()
        self.spans += [Span("learner", name, "learn", asked_at, now) for name, _, asked_at in calls]
