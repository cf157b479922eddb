"""Wall-clock seconds of the stages of one step."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Measures named stages; a stage that is an iterator is measured from its first item asked for to its last."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Measure the body of a `with` statement."""
        self.started[stage] = time.perf_counter()
        yield
        self.ended[stage] = time.perf_counter()

    def watch(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """Pass the items on and measure until they are exhausted."""
        with self.measure(stage):
            yield from items

    def seconds(self, stage: str) -> float:
        """Return how long the stage took."""
        return self.ended[stage] - self.started[stage]

    def seconds_after(self, stage: str, earlier: str) -> float:
        """Return how long the stage went on after another had ended: the part of it that nothing hid."""
        return self.ended[stage] - max(self.ended[earlier], self.started[stage])
