"""Lets one process at a time train in a run directory."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.monitoring.status_file import SILENCE_SECONDS, Status, read_status

POLL_SECONDS = 1.0
HELD = (errno.EACCES, errno.EAGAIN)  # what POSIX lets `lockf` answer where another process has the lock

_log = logging.getLogger("preceptor")


@contextmanager
def run_lock(directory: RunDirectory, silence_seconds: float = SILENCE_SECONDS) -> Iterator[None]:
    """Hold a run directory while the context lasts.

    The lock is the kernel's: it is gone as soon as its process is, however that ended, and a process that was forked
    from it does not have it. A file system may keep locks for each machine apart, or none at all; there the run's signs
    of life count, and those of a run that was killed have ceased after `silence_seconds`.

    Raises:
        CheckpointError: another process trains in the directory, or the file of the lock cannot be made.
    """
    try:
        file = os.open(directory.lock, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise CheckpointError(f"{directory.lock}: cannot be opened to lock the run: {error.strerror}") from error
    try:
        if not _is_taken(file):
            raise _in_use(directory)
        owner = _owner(directory)
        if owner is not None and owner.host != socket.gethostname():
            _wait_for_silence(directory, owner.host, silence_seconds)
        yield
    finally:
        os.close(file)


def _is_taken(file: int) -> bool:
    """Take the lock; return False where another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in HELD
    return True


def _owner(directory: RunDirectory) -> Status | None:
    """Return the status of the run that seems to go on in the directory; one that is damaged says nothing of it."""
    try:
        status = read_status(directory.status)
    except CheckpointError:
        return None
    return status if status is not None and status.state in ("starting", "running") else None


def _wait_for_silence(directory: RunDirectory, host: str, silence_seconds: float) -> None:
    """Return when a run of another machine has ended, or was silent for so long; raise if it gives a sign of life."""
    _log.warning("waiting up to %.0f s to see whether the run still goes on at %s", silence_seconds, host)
    deadline, heard = time.monotonic() + silence_seconds, directory.status.stat().st_mtime
    while time.monotonic() < deadline:
        time.sleep(min(POLL_SECONDS, silence_seconds))
        if _owner(directory) is None:
            return
        if directory.status.stat().st_mtime != heard:
            raise _in_use(directory)


def _in_use(directory: RunDirectory) -> CheckpointError:
    owner = _owner(directory)
    process = "another process" if owner is None else f"process {owner.pid} on {owner.host}"
    return CheckpointError(f"{directory.path}: {process} trains in it; wait until that run ends, or end it with Ctrl-C")
