"""Passes control requests to a running driver and its answers back: two files in the run directory.

Commands that come together are answered one after the other: each leaves its request when the one that lies there is
answered, and again when another's took its place. A user who may write there may also stop the run; no port is opened.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import msgspec

from cluster.config.run_directory import ControlFiles, RunDirectory
from cluster.contracts.errors import CheckpointError, PreceptorError
from cluster.monitoring.status_file import read_status

CHECK_SECONDS = 1.0  # between two reads of the driver
ANSWER_SECONDS = 60.0  # the driver answers between two events of the run, of which a slow step has few
POLL_SECONDS = 0.2


class Message(msgspec.Struct, frozen=True):
    """Begins every request and every answer."""

    request_id: str


AnyMessage = TypeVar("AnyMessage", bound=Message)


def open_going_run(path: Path) -> RunDirectory:
    """Open the directory of a run that may answer; raise CheckpointError if it holds none, or one that is over."""
    directory = RunDirectory.open(path)
    status = read_status(directory.status)
    if status is not None and status.state not in ("starting", "running"):
        raise CheckpointError(
            f"{path}: the run is over ({status.state}), so nothing of it can be changed; resume it first"
        )
    return directory


class ControlRequests:
    """Finds requests that are new, and answers them; the driver's side."""

    def __init__(self, files: ControlFiles, clock: Callable[[], float] = time.monotonic) -> None:
        self._files, self._clock = files, clock
        answered = read_message(files.answer, Message)
        self._last_request = answered.request_id if answered else ""
        self._next_poll = 0.0

    def take(self, kind: type[AnyMessage]) -> AnyMessage | None:
        """Return a request that is new; most calls return at once."""
        now = self._clock()
        if now < self._next_poll:
            return None
        self._next_poll = now + CHECK_SECONDS
        request = read_message(self._files.request, kind)
        if request is None or request.request_id == self._last_request:
            return None
        self._last_request = request.request_id
        return request

    def answer(self, answer: Message) -> None:
        """Answer a request; the next one is not read before the command that waits has read this answer."""
        write_message(self._files.answer, answer)
        self._next_poll = self._clock() + CHECK_SECONDS


def ask_driver(
    files: ControlFiles, request: Message, kind: type[AnyMessage], timeout_seconds: float = ANSWER_SECONDS
) -> AnyMessage:
    """Leave a request when no other waits, and wait for the driver's answer; raise PreceptorError if none comes."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        answer = read_message(files.answer, kind)
        if answer is not None and answer.request_id == request.request_id:
            return answer
        waiting = read_message(files.request, Message)
        if waiting is None or (answer is not None and waiting.request_id == answer.request_id):
            write_message(files.request, request)
        time.sleep(POLL_SECONDS)
    waiting = read_message(files.request, Message)
    if waiting is not None and waiting.request_id == request.request_id:
        files.request.unlink(missing_ok=True)
    raise PreceptorError(
        f"{files.request.parent}: no driver answered within {timeout_seconds:.0f} s; is the run still going on?"
    )


def write_message(path: Path, value: object) -> None:
    """Write a message; the file is complete or absent."""
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    partial.write_bytes(msgspec.json.encode(value))
    partial.replace(path)


def read_message(path: Path, kind: type[AnyMessage]) -> AnyMessage | None:
    """Return what lies there; None when nothing does, or nothing that can be understood."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
