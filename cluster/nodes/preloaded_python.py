"""Provides an interpreter that starts with torch, transformers and vLLM imported, to Ray's workers and to engines."""

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from cluster.config.run_config import Config
from cluster.nodes import preload, start_preloaded

PYTHON_VARIABLE = "PRECEPTOR_PYTHON"  # the interpreter's path, for this process and those that it starts
BACKLOG = 256  # programs that may wait for the imports
END_SECONDS = 10.0
# The path of a Unix socket has at most 107 bytes; Ray's, below such a folder, are the longest:
# ray/session_2026-01-31_12-00-00_123456_1234567/sockets/dash_MetricsHead.
MAX_BASE_LENGTH = 16
STOPPED = (0, -signal.SIGTERM)

_log = logging.getLogger("preceptor")


def make_folder(prefix: str) -> Path:
    """Make a temporary folder for its owner alone, below which sockets can be."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=base if len(base) <= MAX_BASE_LENGTH else "/tmp"))


def preloading(config: Config) -> AbstractContextManager[None]:
    """Begin to import for a run on a local cluster; nodes of other clusters start their workers themselves."""
    is_local = config.ray.address is None and "RAY_ADDRESS" not in os.environ
    return preloaded_python() if config.ray.preload and is_local else nullcontext()


@contextmanager
def preloaded_python() -> Iterator[None]:
    """Begin to import, and have PYTHON_VARIABLE name the interpreter for as long as a `with` statement lasts.

    Inside another one, that one's interpreter serves. What ends the imports early is logged, and costs time alone.
    """
    if PYTHON_VARIABLE in os.environ:
        yield
        return
    folder = make_folder("preceptor-python-")
    python, address, errors = folder / "python", folder / "socket", folder / "errors"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{start_preloaded.__file__}" "{address}" "$@"\n')
    python.chmod(0o700)
    if not os.access(python, os.X_OK):
        _log.warning("ray.preload: %s takes no programs (noexec); every worker imports by itself", folder.parent)
        shutil.rmtree(folder)
        yield
        return
    with errors.open("w") as stderr, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(address))
        listener.listen(BACKLOG)
        server = subprocess.Popen(
            [sys.executable, preload.__file__, str(listener.fileno()), str(folder)],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,  # Ctrl-C goes to all processes of a terminal's group
        )
    assert server.stdin is not None
    os.environ[PYTHON_VARIABLE] = str(python)
    try:
        yield
    finally:
        del os.environ[PYTHON_VARIABLE]
        server.stdin.close()
        server.terminate()  # it ends at once, unless it has begun to start programs
        try:
            server.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
        if server.returncode not in (None, *STOPPED):  # it may have been about to end by itself
            reason = (errors.read_text().strip().splitlines() or ["it gave no reason"])[-1]
            _log.warning("ray.preload: every worker imported by itself: %s", reason)
        shutil.rmtree(folder, ignore_errors=True)
