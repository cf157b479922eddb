"""Finds what tests leave on the machine: processes, shared memory, temporary files.

Everything that is started while a watch lasts inherits a mark and a folder for temporary files; what others do on the
machine at the same time does not count.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from cluster.nodes.reaper import ProcessTree

MARK = "PRECEPTOR_TESTS"
POLL_SECONDS = 0.2
SETTLE_SECONDS = 60.0  # on a busy machine
# Torch and vLLM keep compiled code and what they know about the machine there for the next process of this user.
CACHES = ("torchinductor_", "vllm_cache_")


class Watch:
    """Looks on while tests run; `environment` is for processes that get one of their own."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self.environment = {"TMPDIR": str(temporary), MARK: str(temporary)}
        self._before = dict[str, str | None]()
        self._census = ProcessTree(MARK, str(temporary))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    @classmethod
    def begin(cls) -> "Watch":
        """Watch what this process starts from now on; pytest's own folders stay where they are."""
        beside = {"PYTEST_DEBUG_TEMPROOT": os.environ.get("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())}
        watch = cls(short_folder())
        changed = watch.environment | beside
        watch._before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        tempfile.tempdir = None
        return watch

    def end(self) -> list[str]:
        """Return what is left once things had time to settle, one line each, and clear the temporary files away."""
        found = self.left()
        self._over.set()
        self._thread.join()
        shutil.rmtree(self.temporary, ignore_errors=True)
        for name, value in self._before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        return found

    def left(self) -> list[str]:
        """Return what is left once things had time to settle, one line each."""
        wait_until(lambda: not self._find())
        return self._find()

    def _find(self) -> list[str]:
        lines = {pid: command_line(pid) for pid, _ in sorted(self._census.count())}
        # This process may have started one, which ends with it.
        processes = [f"process {pid}: {line}" for pid, line in lines.items() if not is_own_resource_tracker(pid, line)]
        shared = [f"shared memory {path}" for path in self._census.shared_memory()]
        files = [f"temporary file {path}" for path in self.temporary.iterdir() if not path.name.startswith(CACHES)]
        return processes + shared + files

    def _look(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            self._census.note_shared_memory()


def short_folder() -> Path:
    """Make a folder in /tmp: the path of a Unix socket below it has at most 107 bytes."""
    return Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))


def wait_until(
    is_true: Callable[[], bool], seconds: float = SETTLE_SECONDS, poll_seconds: float = POLL_SECONDS
) -> bool:
    """Wait until something is true; return whether it became so in time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_seconds)
    return True


def command_line(pid: int) -> str:
    """Return how a process calls itself."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return "(gone)"


def is_own_resource_tracker(pid: int, line: str) -> bool:
    """Return whether a process is the one that multiprocessing starts beside this one."""
    with suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        return parent == os.getpid() and "multiprocessing.resource_tracker" in line
    return False


def without_ray(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment that names no cluster and no token."""
    return {name: value for name, value in environment.items() if not name.startswith(("RAY_A", "PRECEPTOR_CLUSTER"))}
