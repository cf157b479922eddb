"""Calls the workers that one weight update goes to."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.actors.cluster import RAY
from cluster.contracts.errors import ActorDiedError, ActorError, PreceptorError


class Recipients:
    """Calls workers of one pool by position, and passes over those that die.

    The pool notices a death by itself, and the next actor in that place gets the weights then.
    """

    def __init__(self, workers: Sequence[ActorHandle], timeout_seconds: float, kind: str = "rollout") -> None:
        """Take the workers; errors call them `kind` workers."""
        self.workers = dict(enumerate(workers))  # those that live
        self._kind = kind
        self._timeout_seconds = timeout_seconds

    def call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Call every worker that lives with its own argument; return the references."""
        return {
            position: getattr(worker, method).remote(arguments[position]) for position, worker in self.workers.items()
        }

    def poll(self, references: Mapping[int, Any]) -> None:
        """Raise the error of any answer that is there, without waiting; of a worker that is gone, ActorDiedError."""
        if references:
            ready, _ = ray.wait(list(references.values()), num_returns=len(references), timeout=0)
            RAY.get(ready, self._timeout_seconds, f"{self._kind} workers")

    def answers(
        self, references: Mapping[int, Any], what_for: str, on_death: Callable[[], float | None] = lambda: None
    ) -> dict[int, Any]:
        """Return the answers of the workers that live; from now on the others are passed over.

        `on_death` is called when one is gone; the others are then waited for as many seconds as it returns, if any.
        """
        try:
            answers = RAY.get(list(references.values()), self._timeout_seconds, f"{self._kind} workers to {what_for}")
            return dict(zip(references, answers, strict=True))
        except ActorDiedError:
            seconds = on_death() or self._timeout_seconds
            living = {}
            for position, reference in references.items():
                with suppress(ActorDiedError):
                    living[position] = RAY.get(reference, seconds, f"{self._kind} worker {position} to {what_for}")
            self.workers = {position: self.workers[position] for position in living}
            return living

    def first_error(self, references: Mapping[int, Any], what_for: str) -> Exception | None:
        """Wait for every answer, and return the first error of a worker that lives; the dead are passed over.

        Raises:
            ActorError: a worker did not answer in time.
        """
        first: Exception | None = None
        for position, reference in references.items():
            try:
                RAY.get(reference, self._timeout_seconds, f"{self._kind} worker {position} to {what_for}")
            except ActorDiedError:
                del self.workers[position]
            except ActorError:
                raise
            except (PreceptorError, RayError) as error:
                first = first or error
        return first
