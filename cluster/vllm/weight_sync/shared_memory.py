"""Lets a process beside the actor, which is no Ray process, read a buffer that the actor got from Ray's object store.

Ray's store is one shared-memory file per node, unlinked once it is open; its raylet keeps a descriptor to hand to new
workers. The actor reads in its own memory map which file a buffer lies in and where, and finds the raylet's descriptor
of that file under /proc: any process of this user can open it by that path. Bytes that travelled to a node once are
so read in place by every engine there, without a copy per engine.

Where that fails (a buffer outside the store, a raylet that is not known, a /proc that hides it), the
bytes are copied into an anonymous memory file of the actor.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

RAYLET_VARIABLE = "RAY_RAYLET_PID"  # Ray tells its workers
STORE_FILE = "/plasma"  # begins the name of every file that Ray's object store maps, /dev/shm and spilling alike


@dataclass(frozen=True)
class Region:
    """Names bytes that another process of this user on this node can map."""

    path: str
    offset: int
    num_bytes: int


FileId = tuple[int, int]  # device and inode


@contextmanager
def mappable(buffer: pa.Buffer) -> Iterator[Region]:
    """Say where another process can map the buffer; the caller keeps the buffer for as long as it is read."""
    region = region_in_store(buffer)
    if region is not None:
        yield region
        return
    with shared_memory(buffer) as path:
        yield Region(path, 0, buffer.size)


def region_in_store(buffer: pa.Buffer) -> Region | None:
    """Return where the buffer lies in the node's object store; None if it does not, or the store cannot be reached."""
    mapped = _mapped_file(buffer.address)
    path = _open_by_raylet(mapped[0]) if mapped else None
    return Region(path, mapped[1], buffer.size) if mapped and path else None


@contextmanager
def shared_memory(buffer: pa.Buffer | bytes) -> Iterator[str]:
    """Copy the bytes into memory that other processes of this user can map, and yield the path to open it by.

    The memory has no name in a file system, so it is limited by RAM instead of by /dev/shm, and nothing is left behind
    when the process dies. It is freed when this context and the last mapping are gone.
    """
    descriptor = os.memfd_create("preceptor-weights")
    try:
        with open(descriptor, "wb", closefd=False) as shared:
            shared.write(buffer)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _mapped_file(address: int) -> tuple[FileId, int] | None:
    """Return the store's file that an address lies in, and where in it; the format is that of proc(5)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if STORE_FILE not in line:
            continue
        addresses, permissions, offset, device, inode, *_ = line.split(maxsplit=5)
        first, last = (int(bound, 16) for bound in addresses.split("-"))
        if first <= address < last:
            major, minor = (int(number, 16) for number in device.split(":"))
            file_id = os.makedev(major, minor), int(inode)
            return (file_id, int(offset, 16) + address - first) if permissions.endswith("s") else None
    return None


def _open_by_raylet(file_id: FileId) -> str | None:
    """Return a path of the file that this Ray worker's raylet has open; the worker may be another process's child."""
    with suppress(OSError):
        for path in Path(f"/proc/{os.environ.get(RAYLET_VARIABLE, os.getppid())}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile, or not readable by this user
                status = path.stat()
                if (status.st_dev, status.st_ino) == file_id and os.access(path, os.R_OK):
                    return str(path)
    return None
