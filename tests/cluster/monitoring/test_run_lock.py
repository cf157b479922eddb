import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.monitoring.run_lock import run_lock
from cluster.monitoring.status_file import KeptStatus, change_status
from tests.builders import make_config

# Trains, as far as the directory shows; a child that was forked outlives it.
HOLDER = """
import os, sys, time
from pathlib import Path
from cluster.config.run_directory import RunDirectory
from cluster.monitoring.run_lock import run_lock
from cluster.monitoring.status_file import KeptStatus

directory = RunDirectory(Path(sys.argv[1]))
with run_lock(directory):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    with KeptStatus(directory.status, steps=10):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(make_config(f"run.directory={tmp_path}", "run.name=r", "run.steps=10"))


@contextmanager
def holder(directory: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """Start a process that trains in the directory; it ends with the context, as its child does."""
    command = [sys.executable, "-c", HOLDER, str(directory.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_a_run_that_lives_is_not_resumed(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(directory) as process:
        assert main(["train", "--resume", str(directory.path), "ray.preload=false"]) == 1
    assert capsys.readouterr().err == (
        f"preceptor: {directory.path}: process {process.pid} on {socket.gethostname()} trains in it; "
        "wait until that run ends, or end it with Ctrl-C\n"
    )


def test_the_lock_of_a_run_that_was_killed_is_not_in_the_way_though_its_child_lives(directory: RunDirectory) -> None:
    with holder(directory) as process:
        process.kill()
        process.wait()
        with run_lock(directory):
            assert directory.lock.stat().st_mode & 0o777 == 0o600


def seem_to_run_elsewhere(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=10):
        pass
    change_status(directory.status, state="running", host="elsewhere", pid=7)


def test_a_run_of_another_machine_that_was_killed_is_waited_for_until_it_counts_as_silent(
    directory: RunDirectory,
) -> None:
    seem_to_run_elsewhere(directory)
    began = time.monotonic()
    with run_lock(directory, silence_seconds=0.2):
        assert time.monotonic() - began >= 0.2


def test_a_run_of_another_machine_that_gives_a_sign_of_life_keeps_its_directory(directory: RunDirectory) -> None:
    seem_to_run_elsewhere(directory)
    alive = threading.Timer(0.1, lambda: os.utime(directory.status))
    alive.start()
    with (
        pytest.raises(CheckpointError, match="process 7 on elsewhere trains in it"),
        run_lock(directory, silence_seconds=60.0),
    ):
        pytest.fail("it was taken")
    alive.join()


def test_a_damaged_status_is_no_owner(directory: RunDirectory) -> None:
    directory.status.write_text('{"state": "asleep"}')
    with run_lock(directory):
        pass
