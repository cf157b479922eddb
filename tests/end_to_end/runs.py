"""Real runs of the embedded models, each in a process of its own and looked at from outside."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster.nodes.preloaded_python import PYTHON_VARIABLE
from cluster.nodes.reaper import MARK as CLUSTER_MARK
from cluster.nodes.reaper import MARK_FD, ProcessTree
from tests.interpreter import python
from tests.leak_check import MARK, Watch, command_line, short_folder, wait_until, without_ray

COMMAND_LINE = "import sys; from cluster.cli import main; sys.exit(main())"
COMMAND_SECONDS = 500
STARTED_SECONDS = 500
ENDED_SECONDS = 120
LISTENING = "0A"
RAY_FOLDER = Path("/tmp/ray")
SMALL = (
    "prompts.prompts_per_step=32",
    "learner.warmup_steps=1",
    "learner.num_workers=2",
)


@dataclass(frozen=True)
class Finished:
    """A finished `preceptor` command."""

    code: int
    output: str
    error: str


def preceptor(*arguments: str) -> Finished:
    """Run the command line in a process of its own; its imports are there if the test uses the fixture `preloaded`."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run(
        [python(), "-c", COMMAND_LINE, *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return Finished(found.returncode, found.stdout, found.stderr)


@dataclass
class Run:
    """A run under way."""

    process: "subprocess.Popen[str]"
    watch: Watch
    directory: Path
    lines: list[str] = field(default_factory=list)
    ray_folders_before: list[Path] = field(default_factory=lambda: list(RAY_FOLDER.glob("session_*")))

    def wait_for(self, start_of_line: str) -> None:
        """Wait until it prints a line that starts like this."""
        found = wait_until(lambda: any(line.startswith(start_of_line) for line in self.lines), STARTED_SECONDS)
        assert found, "".join(self.lines)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal as a terminal does: to the driver and all processes of its group."""
        os.killpg(self.driver(), number)

    def driver(self) -> int:
        """Return the driver's process id: a forked one has another than its stand-in, and a group of its own."""
        pids = [pid for pid, _ in ProcessTree(MARK, str(self.watch.temporary)).count()]
        marks = {pid: Path(f"/proc/{pid}/fd/{MARK_FD}").resolve() for pid in pids}
        return next((pid for pid in pids if marks[pid] == self.watch.temporary), self.process.pid)

    def left(self) -> list[str]:
        """Return what is left of it once things had time to settle, one line each; also where Ray puts it by itself."""
        sessions = set(RAY_FOLDER.glob(f"session_*_{self.process.pid}")) - set(self.ray_folders_before)
        return [*self.watch.left(), *map(str, sessions)]

    def read(self) -> None:
        """Collect what it prints."""
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.lines.append(line)


@contextmanager
def running(
    directory: Path, *overrides: str, command: Sequence[str] = ("demo",), is_forked: bool = False, **variables: str
) -> Iterator[Run]:
    """Start a run in a session of its own; kill it at the end if it still runs.

    It imports by itself, as a user's does, or is forked from where the imports are (`preloaded`); its mark is then the
    file that such a copy opens of its cluster's folder.
    """
    watch = Watch(short_folder())
    environment = without_ray(os.environ) | ({CLUSTER_MARK: str(watch.temporary)} if is_forked else {})
    if not is_forked:
        environment.pop(PYTHON_VARIABLE, None)
    process = subprocess.Popen(
        [
            *([python(), "-c", COMMAND_LINE] if is_forked else [sys.executable, "-m", "cluster.cli"]),
            *command,
            f"run.directory={directory}",
            "run.name=run",
            *SMALL,
            *overrides,
        ],
        env={**environment, **watch.environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    run = Run(process, watch, directory / "run")
    reader = threading.Thread(target=run.read)
    reader.start()
    try:
        yield run
    finally:
        process.kill()
        process.wait()
        reader.join()
        watch.end()


@dataclass
class BalanceSample:
    """What was seen of a run while it lasted."""

    addresses: set[tuple[str, str]] = field(default_factory=set)  # address, command line of who listens on it
    temporary: dict[Path, bytes] = field(default_factory=dict)  # what its temporary files held last
    open_folders: set[Path] = field(default_factory=set)  # temporary ones, that others than the owner could enter


def look_on(run: Run) -> BalanceSample:
    """Watch a run until it comes to its end."""
    seen = BalanceSample()
    process_tree = ProcessTree(MARK, str(run.watch.temporary))
    while run.process.poll() is None:
        seen.addresses |= listening([pid for pid, _ in process_tree.count()])
        for folder in run.watch.temporary.iterdir():
            if folder.name.startswith("preceptor-"):
                with suppress(FileNotFoundError):
                    if folder.stat().st_mode & 0o077:
                        seen.open_folders.add(folder)
                seen.temporary |= read_all(folder)
        time.sleep(0.5)
    assert run.process.returncode == 0, "".join(run.lines)
    return seen


def read_all(folder: Path) -> dict[Path, bytes]:
    """Return the contents of all files below a folder that changes meanwhile."""
    found = {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            with suppress(OSError):
                if path.is_file():
                    found[path] = path.read_bytes()
    return found


def listening(pids: Sequence[int]) -> set[tuple[str, str]]:
    """Return the addresses that processes accept connections at, and the command line of each."""
    found, listeners = set(), tcp_listeners()  # the kernel takes milliseconds to list them
    for pid in pids:
        try:
            links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
        found |= {(address, command_line(pid)) for inode, address in listeners.items() if inode in inodes}
    return found


def tcp_listeners() -> dict[str, str]:
    """Return the address of each listening TCP socket of this machine by its inode."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: host(row[1].split(":")[0]) for row in rows if row[3] == LISTENING}


def host(words: str) -> str:
    """Read an address as /proc/net writes it: words of 32 bits in the machine's order."""
    raw = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
