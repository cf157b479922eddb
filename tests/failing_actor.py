"""An actor class that Ray's workers can import, for tests of how errors travel."""

import os
import time

from cluster.contracts.errors import ScoreError


class FailingActor:
    """Does what an actor may do to its caller."""

    def __init__(self, position: int) -> None:
        self._position = position

    def answer(self) -> int:
        return self._position

    def refuse(self) -> None:
        raise ScoreError("row 3 is NaN")

    def sleep_if_last(self) -> None:
        time.sleep(30 * self._position)

    def die(self) -> None:
        os._exit(1)

    def shutdown(self) -> None:
        """End nothing."""
