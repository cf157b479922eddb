"""Wall-clock seconds of the stages of one step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures named stages."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Measure the body of a `with` statement."""
        self.started[stage] = time.perf_counter()
        yield
        self.ended[stage] = time.perf_counter()

    def seconds(self, stage: str) -> float:
        """Return how long the stage took."""
        return self.ended[stage] - self.started[stage]
