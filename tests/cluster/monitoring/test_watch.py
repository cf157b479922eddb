import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import TrainingError
from cluster.contracts.files import RecordsFile
from cluster.monitoring.status_file import KeptStatus, change_status
from cluster.monitoring.watch import watch_status
from tests.builders import make_config
from tests.leak_check import wait_until


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(make_config(f"run.directory={tmp_path}", "run.name=r", "run.steps=10"))


def do_step(directory: RunDirectory, step: int) -> None:
    RecordsFile(directory.metrics).write({"step": step, "train/kl": 1.0 / step, "pool/rollout/busy_share": 0.5})
    change_status(directory.status, state="running", step=step)


def wait_for_line(start: str, count: int = 1) -> None:
    """Wait until the watch has printed so many lines that start like this."""
    printed: Any = sys.stdout  # pytest's, which keeps all of it
    assert wait_until(lambda: f"\n{printed.getvalue()}".count(f"\n{start}") >= count, poll_seconds=0.01)


def train(directory: RunDirectory, watching: threading.Event) -> None:
    """Do two steps; once they are watched, the third, an alarm, steps 2 and 3 again, and fail."""
    for step in (1, 2):
        do_step(directory, step)
    watching.wait()
    wait_for_line("step 2 ")
    for again in (False, True):
        if again:
            RecordsFile(directory.metrics).drop_from(2)
            do_step(directory, 2)
        do_step(directory, 3)
        RecordsFile(directory.alarms).write({"step": 3, "alarm": "long", "action": "warn"})
        wait_for_line("step 3 ", 1 + again)
    raise TrainingError("the loss is not finite")


def test_a_pipe_gets_a_line_per_step_and_how_the_run_ended(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_and_fail() -> None:
        with pytest.raises(TrainingError), KeptStatus(directory.status, steps=12):
            train(directory, watching)

    watching = threading.Event()
    run = threading.Thread(target=run_and_fail)
    run.start()
    while not directory.metrics.exists() or len(RecordsFile(directory.metrics).lines()) < 2:
        time.sleep(0.01)
    watching.set()
    watch_status(directory.path, poll_seconds=0.05)
    run.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["step 2  KL/token 0.5000", "step 3  KL/token 0.3333", "alarm long at step 3 (warn)"]
    assert lines[-1] == "r: failed, step 3 of 12; the loss is not finite"
    assert lines.count("step 3  KL/token 0.3333") == 2  # it was done again


def test_a_run_that_has_ended_is_shown_once(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with KeptStatus(directory.status, steps=10):
        do_step(directory, 10)
    assert main(["status", str(directory.path), "--watch"]) == 0
    assert capsys.readouterr().out == "step 10  KL/token 0.1000\nr: ended, step 10 of 10\n"


def test_json_and_watch_exclude_each_other(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(directory.path), "--watch", "--json"]) == 1
    assert "give one of them" in capsys.readouterr().err


def test_a_terminal_is_drawn_until_ctrl_c_leaves_it(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=10):
        do_step(directory, 4)
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "cluster.cli", "status", str(directory.path), "--watch"]
        environment = {**os.environ, "TERM": "xterm", "LANG": "C.UTF-8"}
        process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
        os.close(slave)
        shown = b""
        while b"step 4 of 10" not in shown or b"50% busy" not in shown:
            shown += os.read(master, 4096)
        process.send_signal(2)
        assert process.wait(timeout=20) == 0
        os.close(master)
