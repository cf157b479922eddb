"""What a command wishes of a running driver, and what the driver answers: two files in the run directory.

Commands that come together are answered one after the other: each leaves its wish when the one that lies there is
answered, and again when another's took its place. Who may write there may also stop the run; no port is opened for it.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar
from uuid import uuid4

import msgspec

from cluster.config.run_directory import WishFiles
from cluster.contracts.errors import PreceptorError

LOOK_SECONDS = 1.0  # between two looks of the driver
ANSWER_SECONDS = 60.0  # the driver answers between two events of the run, of which a slow step has few
POLL_SECONDS = 0.2


class _Message(Protocol):
    @property
    def wish_id(self) -> str: ...


Wish = TypeVar("Wish", bound=_Message)
Answer = TypeVar("Answer", bound=_Message)
Struct = TypeVar("Struct")


class _Named(msgspec.Struct, frozen=True):
    """What every message begins with."""

    wish_id: str


class WishReader:
    """The driver's side: finds wishes that are new, and answers them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, last_wish: str = "") -> None:
        """Begin to look; the wish whose id is `last_wish` counts as old."""
        self._clock = clock
        self._last_wish = last_wish
        self._next_look = 0.0

    def take(self, path: Path, kind: type[Wish]) -> Wish | None:
        """Return a wish that is new; most calls return at once."""
        now = self._clock()
        if now < self._next_look:
            return None
        self._next_look = now + LOOK_SECONDS
        wish = read_message(path, kind)
        if wish is None or wish.wish_id == self._last_wish:
            return None
        self._last_wish = wish.wish_id
        return wish

    def answer(self, path: Path, answer: _Message) -> None:
        """Answer a wish; the next one is not looked at before whoever waits for this answer has seen it."""
        write_message(path, answer)
        self._next_look = self._clock() + LOOK_SECONDS


def ask_driver(files: WishFiles, wish: _Message, kind: type[Answer], timeout_seconds: float = ANSWER_SECONDS) -> Answer:
    """Leave a wish when no other waits for its answer, and wait for the driver's answer to it.

    Raises:
        PreceptorError: nobody answered.
    """
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        answer = read_message(files.answer, kind)
        if answer is not None and answer.wish_id == wish.wish_id:
            return answer
        waiting = read_message(files.wish, _Named)
        if waiting is None or (answer is not None and waiting.wish_id == answer.wish_id):
            write_message(files.wish, wish)
        time.sleep(POLL_SECONDS)
    waiting = read_message(files.wish, _Named)
    if waiting is not None and waiting.wish_id == wish.wish_id:
        files.wish.unlink(missing_ok=True)
    raise PreceptorError(
        f"{files.wish.parent}: no driver answered within {timeout_seconds:.0f} s; is the run still going on?"
    )


def write_message(path: Path, value: object) -> None:
    """Write a message; the file is complete or absent."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)


def read_message(path: Path, kind: type[Struct]) -> Struct | None:
    """Return what lies there; None when nothing does, or nothing that can be understood."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
