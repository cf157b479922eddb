"""However a run ends, no process, shared memory or temporary file of it stays, and it listens on loopback alone."""

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.keeper import Census
from tests.leftovers import MARK, Watch, command_line, short_folder, wait_until, without_ray

STARTED_SECONDS = 300
ENDED_SECONDS = 120
LISTENING = "0A"
LONG = (
    "prompts.prompts_per_step=32",
    "evaluation.num_prompts=16",
    "evaluation.teacher_too=false",
    "learner.warmup_steps=1",
    "learner.num_workers=2",
)
# Values that must appear nowhere but in the environment that they were given in.
CANARIES = {
    "HF_TOKEN": "hf_canary4f1d0c7a",
    "WANDB_API_KEY": "wandbcanary9b2e6d31",
    "RAY_AUTH_TOKEN": "ab7c" * 16,
}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Run:
    """A `preceptor demo` under way."""

    process: "subprocess.Popen[str]"
    watch: Watch
    directory: Path
    lines: list[str] = field(default_factory=list)

    def wait_for(self, start_of_line: str) -> None:
        """Wait until it prints a line that starts like this."""
        found = wait_until(lambda: any(line.startswith(start_of_line) for line in self.lines), STARTED_SECONDS)
        assert found, "".join(self.lines)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal as a terminal does: to the driver and all processes of its group."""
        os.killpg(self.process.pid, number)

    def read(self) -> None:
        """Collect what it prints."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)


@contextmanager
def running(directory: Path, *overrides: str, **variables: str) -> Iterator[Run]:
    """Start a run in a session of its own; kill it at the end if it still runs."""
    watch = Watch(short_folder())
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "demo", f"run.directory={directory}", "run.name=run", *LONG, *overrides],
        env={**without_ray(os.environ), **watch.environment, **variables},
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


def one_interrupt(run: Run) -> int:
    run.signal_group(signal.SIGINT)
    return run.process.wait(ENDED_SECONDS)


def two_interrupts(run: Run) -> int:
    run.signal_group(signal.SIGINT)
    time.sleep(0.2)
    run.signal_group(signal.SIGINT)
    return run.process.wait(ENDED_SECONDS)


def termination(run: Run) -> int:
    run.process.terminate()
    return run.process.wait(ENDED_SECONDS)


def killing(run: Run) -> int:
    run.process.kill()
    return run.process.wait(ENDED_SECONDS)


ENDINGS: list[tuple[Callable[[Run], int], str, int, bool]] = [
    (one_interrupt, "step 2 ", 130, True),
    (two_interrupts, "step 2 ", 130, False),
    (one_interrupt, "run: ", 130, False),  # while engines start
    (termination, "step 2 ", 130, True),
    (termination, "run: ", 130, False),
    (killing, "step 2 ", -signal.SIGKILL, False),
]


@pytest.mark.parametrize(("end", "after", "code", "has_checkpoint"), ENDINGS)
def test_nothing_stays_of_a_run_that_is_ended(
    end: Callable[[Run], int], after: str, code: int, has_checkpoint: bool, tmp_path: Path
) -> None:
    with running(tmp_path, "run.steps=100000", "ray.dashboard=false") as run:
        run.wait_for(after)
        assert end(run) == code, "".join(run.lines)
        assert run.watch.left() == []
        assert (run.directory / "checkpoints").exists() == has_checkpoint
        assert default_ray_folders(run.process.pid) == []


@pytest.fixture(scope="module")
def watched_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator["WatchedRun"]:
    """A run that comes to its end, with secrets in its environment and an open umask; looked at all the time."""
    directory = tmp_path_factory.mktemp("parent") / "made/by/the/run"
    before = os.umask(0)
    try:
        with running(directory, "run.steps=2", **CANARIES) as run:
            os.umask(before)
            yield look_on(run)
    finally:
        os.umask(before)


@dataclass
class WatchedRun:
    """What was seen of a run while it lasted."""

    run: Run
    addresses: set[tuple[str, str]] = field(default_factory=set)  # address, command line of who listens on it
    temporary: dict[Path, bytes] = field(default_factory=dict)  # what its temporary files held last
    open_folders: set[Path] = field(default_factory=set)  # temporary ones, that others than the owner could enter


def look_on(run: Run) -> WatchedRun:
    """Watch a run until it ends."""
    seen = WatchedRun(run)
    census = Census(MARK, str(run.watch.temporary))
    while run.process.poll() is None:
        seen.addresses |= listening([pid for pid, _ in census.count()])
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
    found = set()
    for pid in pids:
        try:
            links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
        found |= {(address, command_line(pid)) for inode, address in tcp_listeners().items() if inode in inodes}
    return found


def tcp_listeners() -> dict[str, str]:
    """Return the address of each listening TCP socket of this machine by its inode."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[9]: host(row[1].split(":")[0]) for row in rows if row[3] == LISTENING}


def host(words: str) -> str:
    """Read an address as /proc/net writes it: words of 32 bits in the machine's order."""
    raw = b"".join(struct.pack("=I", int(words[i : i + 8], 16)) for i in range(0, len(words), 8))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def default_ray_folders(pid: int) -> list[Path]:
    """Return the session folders that a process made at the place where Ray makes them by itself."""
    return list(Path("/tmp/ray").glob(f"session_*_{pid}"))


def test_nothing_stays_of_a_run_that_comes_to_its_end(watched_run: WatchedRun) -> None:
    assert watched_run.run.watch.left() == []
    assert default_ray_folders(watched_run.run.process.pid) == []


def test_every_socket_listens_on_loopback(watched_run: WatchedRun) -> None:
    listeners = {command for _, command in watched_run.addresses}
    for name in ("gcs_server", "raylet", "dashboard", "ray::RolloutActor", "ray::LearnerActor", "VLLM::EngineCore"):
        assert any(name in command for command in listeners), f"{name} was not seen"
    elsewhere = {pair for pair in watched_run.addresses if pair[0] not in ("127.0.0.1", "::ffff:127.0.0.1", "::1")}
    assert elsewhere == set()


def test_no_secret_of_the_environment_is_written_anywhere(watched_run: WatchedRun) -> None:
    written = read_all(watched_run.run.directory) | watched_run.temporary
    assert any(path.name == "config.json" for path in written)
    assert any(path.name.startswith("raylet") for path in written)
    written[Path("the terminal")] = "".join(watched_run.run.lines).encode()
    found = {
        (str(path), name) for path, text in written.items() for name in CANARIES if CANARIES[name].encode() in text
    }
    assert found == set()


def test_only_the_owner_may_read_what_a_run_writes_whatever_the_umask(watched_run: WatchedRun) -> None:
    paths = [watched_run.run.directory, *watched_run.run.directory.rglob("*")]
    assert {path.name for path in paths} >= {"config.json", "metrics.jsonl", "checkpoints", "export"}
    assert [path for path in paths if path.stat().st_mode & 0o077] == []
    assert [path for path in watched_run.run.directory.parents[:4] if path.stat().st_mode & 0o077] == []
    assert watched_run.open_folders == set()
