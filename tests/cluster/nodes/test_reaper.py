"""The program that clears away after a local cluster, with processes that stand for the cluster's."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import reaper
from tests.leak_check import command_line, wait_until

SOON = 60.0  # seconds; the machine may be busy
HOLDS_A_SEMAPHORE = """
import multiprocessing, time
semaphore = multiprocessing.get_context("spawn").Semaphore()
print("sem." + semaphore._semlock.name[1:], flush=True)
time.sleep(600)
"""
STARTS_A_CHILD_WITHOUT_MARK = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"], env={})
print(child.pid, flush=True)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    return command_line(pid) not in ("", "(gone)")


def ignores(pid: int, number: signal.Signals) -> bool:
    [ignored] = re.findall(r"^SigIgn:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(ignored, 16) & 1 << number - 1)


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[bytes]"]]:
    """A folder and its keeper, whose owner is this process."""
    folder = tmp_path / "kept"
    (folder / "below").mkdir(parents=True)
    (folder / "below/file").write_text("x")
    process = subprocess.Popen([sys.executable, "-I", "-S", reaper.__file__, str(folder)], stdin=subprocess.PIPE)
    assert wait_until(lambda: ignores(process.pid, signal.SIGHUP))  # the last thing that it prepares
    yield folder, process
    process.kill()
    process.communicate()


def start(folder: Path, script: str) -> tuple["subprocess.Popen[str]", str]:
    """Start a process of the cluster; return it and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, reaper.MARK: str(folder)},
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def close(keeper_process: "subprocess.Popen[bytes]") -> None:
    assert keeper_process.stdin is not None
    keeper_process.stdin.close()
    assert keeper_process.wait(timeout=2 * reaper.GRACE_SECONDS + SOON) == 0


def test_the_folder_goes_when_the_owner_ends_and_not_before(kept: tuple[Path, "subprocess.Popen[bytes]"]) -> None:
    folder, process = kept
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2 * reaper.POLL_SECONDS)
    assert (folder / "below/file").exists()
    close(process)
    assert not folder.exists()


def test_what_a_terminal_sends_does_not_end_it(kept: tuple[Path, "subprocess.Popen[bytes]"]) -> None:
    folder, process = kept
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2 * reaper.POLL_SECONDS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2 * reaper.POLL_SECONDS)
    close(process)
    assert not folder.exists()


def test_processes_that_do_not_end_are_killed_and_others_are_not(
    kept: tuple[Path, "subprocess.Popen[bytes]"],
) -> None:
    folder, process = kept
    member, child = start(folder, STARTS_A_CHILD_WITHOUT_MARK)
    stranger, _ = start(folder.with_name("another"), "import time; print(flush=True); time.sleep(600)")
    close(process)
    assert member.wait(timeout=SOON) == -signal.SIGKILL
    assert wait_until(lambda: not is_running(int(child)), SOON)
    assert stranger.poll() is None
    stranger.kill()
    stranger.communicate()
    member.communicate()


def test_shared_memory_of_a_process_that_was_killed_goes(kept: tuple[Path, "subprocess.Popen[bytes]"]) -> None:
    folder, process = kept
    member, name = start(folder, HOLDS_A_SEMAPHORE)
    entry = reaper.SHARED_MEMORY / name
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(6 * reaper.POLL_SECONDS)
    (tracker,) = [pid for pid in reaper._process_ids() if (reaper._stat(pid) or (0, 0))[0] == member.pid]
    os.kill(tracker, signal.SIGKILL)  # it would have removed the semaphore
    member.kill()
    member.communicate()
    assert entry.exists()
    close(process)
    assert not entry.exists()
