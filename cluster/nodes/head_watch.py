"""Notices that the head of a cluster is gone, which is the end of a run, and says so.

Ray itself ends a driver whose head has been silent for a minute at once, with a line in a log and none on the terminal.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.contracts.config import Config
from cluster.observability.status_file import change_status, read_status
from cluster.run_directory import RunDirectory

# Ray's own patience. Where the head keeps its data elsewhere and may come back, who runs the cluster sets it higher.
RAY_PATIENCE, RAY_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s", 60.0
SOONER = 0.75  # than Ray, which would end the driver first
FAILED = 1  # exit code


@dataclass(frozen=True)
class Patience:
    """How often a head is asked, and how long it may be silent."""

    look_seconds: float = 5.0  # between two looks, and for one
    silent_seconds: float = field(default_factory=lambda: SOONER * float(os.environ.get(RAY_PATIENCE) or RAY_SECONDS))


@contextmanager
def watch_head(address: str, give_up: Callable[[float], None], patience: Patience | None = None) -> Iterator[None]:
    """Look in a thread whether somebody takes connections at the head's address, while the context lasts.

    Args:
        address: host:port of Ray's GCS.
        give_up: called once, in the thread, with the seconds of silence.
        patience: how long to wait.
    """
    over = threading.Event()
    arguments = (address, give_up, patience or Patience(), over)
    thread = threading.Thread(target=_watch, args=arguments, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()  # nobody waits for the thread: a look at a head that is gone takes seconds


def end_run(config: Config, address: str, silent_seconds: float) -> None:
    """Say that the run ends because its head is gone, and end this process before Ray does."""
    directory = RunDirectory(Path(config.run.directory) / config.run.name)
    status = read_status(directory.status)
    is_training = status is not None and status.pid == os.getpid()
    resume = f", and go on with preceptor train --resume {directory.path}" if is_training else ""
    sentence = (
        f"the head of the Ray cluster has not answered at {address} for {silent_seconds:.0f} s, and nothing can go on "
        f"without it; start the cluster again{resume}"
    )
    if is_training:
        with suppress(OSError):  # its disk may have gone with the head, and the sentence is what counts
            change_status(directory.status, state="failed", error=sentence)
    sys.stderr.write(f"preceptor: {sentence}\n")
    sys.stderr.flush()
    os._exit(FAILED)  # an orderly end would wait for the head


def _watch(address: str, give_up: Callable[[float], None], patience: Patience, over: threading.Event) -> None:
    heard = time.monotonic()
    while not over.wait(patience.look_seconds):
        if _answers(address, patience.look_seconds):
            heard = time.monotonic()
        elif (silent := time.monotonic() - heard) >= patience.silent_seconds and not over.is_set():
            give_up(silent)
            return


def _answers(address: str, seconds: float) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), seconds).close()
    except OSError:
        return False
    return True
