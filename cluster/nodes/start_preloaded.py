"""Runs a Python program in a copy of a process that has imported the large packages already; see `preload.py`.

Takes the interpreter's place: `python -I -S start_preloaded.py SOCKET ARGUMENTS...` does what `python ARGUMENTS...`
does, ten CPU-seconds sooner. This process stays as the program's stand-in: it passes signals on and ends as the program
ends, and the program ends with it. If the socket does not take the program, this process becomes it in the usual way.

A program of its own, on the standard library alone, because it must start at once.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

# It imports nothing large, and outlives the process that starts it, to remove what that one leaves.
RESOURCE_TRACKER = "multiprocessing.resource_tracker"
PASSED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Start the program, wait for its end and end in the same way."""
    address, *arguments = sys.argv[1:]
    fds = [fd for fd in (int(path.name) for path in Path("/proc/self/fd").iterdir()) if _is_inherited(fd)]
    program = arguments[1:] if arguments[:1] == ["-B"] else arguments  # as the server was started
    if RESOURCE_TRACKER in "".join(program[1:2]):
        os.execv(sys.executable, [sys.executable, *arguments])
    umask = os.umask(0)
    os.umask(umask)
    place = {"folder": str(Path.cwd()), "umask": umask, "fds": fds}
    request = {"arguments": program, "environment": dict(os.environ), **place}
    try:
        answers = _send(address, json.dumps(request).encode(), fds)
        pid = int(answers.readline() or 0)
    except OSError:  # the server is gone, or there are more files than one message passes
        pid = 0
    if not pid:
        os.execv(sys.executable, [sys.executable, *arguments])
    for number in PASSED_SIGNALS:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    for fd in fds:
        os.close(fd)  # whoever reads a pipe to its end waits for the program, not for its stand-in
    _end_as(int(answers.readline() or -signal.SIGKILL))


def _send(address: str, body: bytes, fds: list[int]) -> "socket.SocketIO":
    """Send a request; the lines of the answer are the program's process id and, when it ends, its exit status."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address)
    socket.send_fds(connection, [len(body).to_bytes(8, "big")], fds)
    connection.sendall(body)
    return connection.makefile("rb", buffering=0)


def _is_inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # it was that of the listing
        return False


def _end_as(status: int) -> None:
    """End with an exit status, or by the signal that a negative one names."""
    if status < 0:
        if -status in PASSED_SIGNALS:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
