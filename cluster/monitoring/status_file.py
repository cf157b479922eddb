"""Writes and reads status.json, which the run itself keeps fresh while it lives.

The file's content changes with every step; its time of change is the run's sign of life, and moves every few seconds.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from cluster.contracts.batches import PoolState
from cluster.contracts.errors import CheckpointError, in_one_line
from cluster.contracts.files import read_text, write_atomically
from cluster.monitoring.observers import Ending, StepSample, ending_of

MAX_STATUS_BYTES = 1 << 24
SIGN_OF_LIFE_SECONDS = 5.0
SILENCE_SECONDS = 30.0  # after which a run counts as lost; a file system may show others' changes late


class Status(msgspec.Struct, frozen=True):
    """Describes the run; times are seconds since 1970."""

    state: Literal["starting", "running", "ended", "stopped", "failed", "lost"]
    pid: int
    host: str
    started_at: float
    changed_at: float
    step: int = 0  # done
    steps: int = 0  # that the run is to do, which a resumed run may have changed; 0: written by an older version
    pools: tuple[PoolState, ...] = ()
    error: str = ""  # what ended it


class StatusFile:
    """Writes every step into the file."""

    def __init__(self, path: Path, first_step: int) -> None:
        self._path = path
        change_status(path, state="running", step=first_step)

    def on_step(self, sample: StepSample) -> None:
        change_status(self._path, step=sample.step, pools=tuple(sample.pools))

    def close(self, ending: Ending) -> None:
        """Do nothing: the command itself knows how it ends."""


class KeptStatus:
    """Keeps the file of a run while the context lasts, and leaves in it how the run ended."""

    def __init__(self, path: Path, steps: int) -> None:
        """Take the file, and how many steps the run is to do."""
        self._path, self._steps = path, steps
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._give_signs_of_life, name="status", daemon=True)

    def __enter__(self) -> None:
        now = time.time()
        _write(self._path, Status("starting", os.getpid(), socket.gethostname(), now, now, steps=self._steps))
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        with suppress(OSError):  # what ended the run may be a full disk, and is what the user must hear
            change_status(self._path, state=ending_of(error), error=in_one_line(str(error)) if error else "")

    def _give_signs_of_life(self) -> None:
        while not self._over.wait(SIGN_OF_LIFE_SECONDS):
            with suppress(OSError):  # a folder that is gone is the run's affair
                os.utime(self._path)


def change_status(path: Path, **fields: Any) -> None:
    """Change some fields of the file; a run that keeps none has none."""
    if path.exists():
        _write(path, msgspec.structs.replace(_read(path), changed_at=time.time(), **fields))


def read_status(path: Path) -> Status | None:
    """Return how the run stands; None when it never wrote it."""
    if not path.exists():
        return None
    status = _read(path)
    if status.state in ("ended", "stopped", "failed"):
        return status
    is_gone = status.host == socket.gethostname() and not Path(f"/proc/{status.pid}").exists()
    is_silent = time.time() - path.stat().st_mtime >= SILENCE_SECONDS
    return msgspec.structs.replace(status, state="lost") if is_gone or is_silent else status


def _read(path: Path) -> Status:
    text = read_text(path, "run's status", CheckpointError, MAX_STATUS_BYTES)
    try:
        return msgspec.json.decode(text, type=Status)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a run's status: {error}; remove the file") from error


def _write(path: Path, status: Status) -> None:
    write_atomically(path, msgspec.json.format(msgspec.json.encode(status), indent=2).decode())
