"""Clears away what a local Ray cluster leaves behind, whatever ended the process that started it.

A program of its own, on the standard library alone, because a process that is killed clears nothing away. It waits for
the end of its standard input, which is the end of its owner, gives the cluster's processes time to end by themselves,
ends the rest, and removes their shared memory and their folder.
"""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "PRECEPTOR_CLUSTER"  # environment variable of every process of the cluster: its folder
MARK_FD = 999  # the folder, opened, of a copy of a preloaded process, which shows that one's environment
SHARED_MEMORY = Path("/dev/shm")
POLL_SECONDS = 0.5
COUNT_SECONDS = 5.0  # reading all of /proc takes about 10 ms
GRACE_SECONDS = 10.0  # Ray's workers see within a few seconds that their raylet is gone
CLOSING_POLL_SECONDS = 0.05

ProcessKey = tuple[int, int]  # process id and start time in clock ticks: an id alone may be given out again


class ProcessTree:
    """Finds the processes that were started with a variable set to a value, and what they hold in shared memory.

    Ray writes process titles over the environment of some, so descendants count too.
    """

    def __init__(self, variable: str, value: str) -> None:
        self._mark, self._folder = f"{variable}={value}".encode(), value
        self._members: set[ProcessKey] = set()
        self._seen = self._latest = _shared_memory().keys()
        self._owned: set[str] = set()

    def count(self) -> set[ProcessKey]:
        table = {pid: stat for pid in _process_ids() if (stat := _stat(pid)) is not None}
        self._members &= {(pid, start) for pid, (_, start) in table.items()}
        pids = {pid for pid, _ in self._members} | {pid for pid in table if self._is_marked(pid)}
        while grown := {pid for pid, (parent, _) in table.items() if parent in pids} - pids:
            pids |= grown
        self._members = {(pid, table[pid][1]) for pid in pids}
        return self._members

    def note_shared_memory(self) -> None:
        """Note which of the entries that are new since the last call a member has mapped."""
        entries = _shared_memory()
        # Those of the last call once more: a member may have been on its way to be one.
        new, self._seen, self._latest = entries.keys() - self._seen, self._latest, entries.keys()
        if new:
            mapped = {inode for pid, _ in self.count() for inode in _mapped_inodes(pid)}
            self._owned |= {name for name in new if entries[name] in mapped}

    def shared_memory(self) -> list[Path]:
        return [path for name in sorted(self._owned) if (path := SHARED_MEMORY / name).exists()]

    def _is_marked(self, pid: int) -> bool:
        if self._mark in _read(pid, "environ").split(b"\0"):
            return True
        try:
            return Path(f"/proc/{pid}/fd/{MARK_FD}").readlink().is_relative_to(self._folder)
        except OSError:
            return False


def main(folder: Path) -> None:
    """Wait for the owner's end, then clear away."""
    process_tree = ProcessTree(MARK, str(folder))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    next_count = 0.0
    while not select.select([sys.stdin], [], [], POLL_SECONDS)[0]:
        process_tree.note_shared_memory()
        if time.monotonic() >= next_count:
            process_tree.count()
            next_count = time.monotonic() + COUNT_SECONDS
    process_tree.note_shared_memory()
    _end_members(process_tree)
    for path in process_tree.shared_memory():
        path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _end_members(process_tree: ProcessTree) -> None:
    """Wait until no member runs; kill those that still do after GRACE_SECONDS."""
    began = time.monotonic()
    while (members := process_tree.count()) and (waited := time.monotonic() - began) < 2 * GRACE_SECONDS:
        if waited > GRACE_SECONDS:
            for pid, _ in members:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(CLOSING_POLL_SECONDS)


def _process_ids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())


def _stat(pid: int) -> tuple[int, int] | None:
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return None if not fields or fields[0] in (b"Z", b"X") else (int(fields[1]), int(fields[19]))


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:  # gone, or another user's
        return b""


def _mapped_inodes(pid: int) -> Iterator[int]:
    """Yield the inodes of shared memory that a process has mapped; a semaphore is mapped before it is named."""
    for line in _read(pid, "maps").splitlines():
        fields = line.split(maxsplit=5)  # addresses, permissions, offset, device, inode, path
        if len(fields) == 6 and fields[5].startswith(bytes(SHARED_MEMORY)):
            yield int(fields[4])


def _shared_memory() -> dict[str, int]:
    """Return the inode of every entry."""
    return {entry.name: entry.inode() for entry in os.scandir(SHARED_MEMORY)} if SHARED_MEMORY.is_dir() else {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
