"""References whose answers come from something else than Ray: simulated actors, on a simulated clock.

Whoever waits for references asks `answers_of` how. So the pools, the flow and the learner's group run
unchanged over either, and nothing has to be handed to them.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import ray


class Answers(Protocol):
    """Waits for references and gets what they stand for, as the module `ray` does."""

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """Return the value of a reference, or those of a list, waiting for them."""

    def wait(
        self, references: Sequence[Any], *, num_returns: int, timeout: float | None
    ) -> tuple[list[Any], list[Any]]:
        """Return the references that are ready, and the others."""


class Promise:
    """A reference that is not Ray's."""

    def __init__(self, answers: Answers) -> None:
        """Say who knows when it is ready."""
        self.answers = answers


def answers_of(references: Any) -> Answers:
    """Return what to wait with for a reference, or for those of a list, which are all of one kind."""
    first = references[0] if isinstance(references, list) and references else references
    return first.answers if isinstance(first, Promise) else ray
