"""An actor class that Ray's workers can import, for tests of how errors travel."""

import os
import subprocess
import sys
import time

from cluster.contracts.errors import ActorDiedError, ScoreError


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

    def die(self, last_words: str = "") -> None:
        sys.stderr.write(last_words)
        sys.stderr.flush()
        os._exit(1)

    def lose_engine(self, last_words: str) -> None:
        """Print as an engine's process does, to the actor's own output, and report its end."""
        subprocess.run([sys.executable, "-c", "import sys; print(sys.argv[1])", last_words], check=True)
        raise ActorDiedError("the process of an engine is gone")

    def fail(self) -> None:
        raise KeyError("w4")

    def shutdown(self) -> None:
        """End nothing."""
