"""What every refusal of bad input must be: of our errors, one sentence, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.contracts.errors import LONGEST_MESSAGE, PreceptorError

SECONDS_PER_CASE = 30  # far above what any takes; a case that hangs fails instead of holding up the suite


def assert_refused(
    call: Callable[[], object], expected: type[PreceptorError], says: str, folder: Path | None = None
) -> None:
    """Expect one sentence of this class that contains `says`, and no file in the folder that was not there before."""
    before = _files(folder)
    with pytest.raises(expected) as caught:
        call()
    assert type(caught.value) is expected
    assert_sentence(str(caught.value), says)
    assert _files(folder) == before


def assert_sentence(message: str, says: str) -> None:
    """Check a message's form: one line, of a length that a terminal shows, and naming what it is about."""
    assert len(message.splitlines()) == 1, message
    assert len(message) <= LONGEST_MESSAGE + len(" ... ")
    assert "Traceback" not in message
    assert says in message


def _files(folder: Path | None) -> set[Path]:
    return set() if folder is None else set(folder.rglob("*"))
