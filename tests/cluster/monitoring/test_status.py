import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from cluster.cli import main
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import PoolState
from cluster.contracts.errors import ActorDiedError, RunStopped
from cluster.contracts.files import RecordsFile
from cluster.monitoring.observers import StepSample
from cluster.monitoring.status import print_status, read_report
from cluster.monitoring.status_file import SILENCE_SECONDS, KeptStatus, StatusFile, change_status
from tests.builders import make_config

POOLS = [
    PoolState("rollout", ["rollout-0"], 2, 1, num_owed=12),
    PoolState("teacher-main", ["teacher-main-0"], 1, 0, 3, model="models/b", checkpoint="0123456789abcdef"),
]

ROLLOUT_FIGURES = {
    "pool/rollout/busy_share": 0.75,
    "pool/rollout/idle_share": 0.25,
    "pool/rollout/tokens_per_second": 500.0,
}


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run of ten steps of which nothing is done."""
    return RunDirectory.create(make_config(f"run.directory={tmp_path}", "run.name=r", "run.steps=10"))


def see(directory: RunDirectory, **figures: float) -> None:
    record = {"step": 4, **ROLLOUT_FIGURES, **figures}
    RecordsFile(directory.metrics).write(record)
    StatusFile(directory.status, first_step=0).on_step(StepSample(record, [], [], POOLS))


def test_a_run_that_lives_shows_its_step_its_pools_and_their_figures(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=10):
        assert read_report(directory.path).state == "starting"
        see(directory, **{"step/tokens_per_second": 123.0, "generate/queued_completions": 6.5})
        report = read_report(directory.path)
    assert (report.state, report.step, report.steps, report.tokens_per_second) == ("running", 4, 10, 123.0)
    assert report.queued_completions == 6.5
    rollout, teacher = report.pools
    assert (rollout.workers, rollout.wanted, rollout.restarts, rollout.owed) == (["rollout-0"], 2, 1, 12)
    assert (rollout.policy_version, rollout.busy_share, rollout.tokens_per_second) == (4, 0.75, 500.0)
    assert (teacher.policy_version, teacher.busy_share, teacher.owed) == (None, None, 3)


def test_the_latest_moves_of_the_balancer_are_shown(
    directory: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 8):
        RecordsFile(directory.moves).write({"step": step, "sentence": f"rollout {step} -> {step + 1}", "moved": True})
    with KeptStatus(directory.status, steps=10):
        see(directory)
        report = read_report(directory.path)
        print_status(directory.path, as_json=False)
    assert [found["step"] for found in report.moves] == [3, 4, 5, 6, 7]
    assert "balance after step 7: rollout 7 -> 8" in capsys.readouterr().out


def do_a_step_and_raise(directory: RunDirectory, error: Exception) -> None:
    with KeptStatus(directory.status, steps=10):
        see(directory)
        raise error


@pytest.mark.parametrize(
    ("error", "state"),
    [(RunStopped("stopped after step 4"), "stopped"), (ActorDiedError("teacher-main-0\ndied"), "failed")],
)
def test_the_file_says_how_the_run_ended(directory: RunDirectory, error: Exception, state: str) -> None:
    with pytest.raises(type(error)):
        do_a_step_and_raise(directory, error)
    report = read_report(directory.path)
    assert (report.state, report.step, report.error) == (state, 4, str(error))


def test_a_run_that_came_to_its_end_is_ended_however_long_ago(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=10):
        see(directory)
    os.utime(directory.status, (0, 0))
    assert read_report(directory.path).state == "ended"


def test_a_run_whose_process_is_gone_is_lost(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=10):
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        change_status(directory.status, pid=gone.pid)
        assert read_report(directory.path).state == "lost"


def test_a_run_on_another_machine_is_lost_when_it_falls_silent(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=10):
        change_status(directory.status, pid=0, host="elsewhere", state="running")
        assert read_report(directory.path).state == "running"
        before = time.time() - SILENCE_SECONDS - 1
        os.utime(directory.status, (before, before))
        assert read_report(directory.path).state == "lost"


def test_checkpoints_alarms_and_the_latest_evaluation_are_shown(directory: RunDirectory) -> None:
    for name in ("step-2", "step-10", "step-12.partial"):
        (directory.checkpoints / name).mkdir(parents=True)
    RecordsFile(directory.alarms).write({"step": 3, "alarm": "truncation", "action": "warn"})
    for step, accuracy in ((1, 0.25), (2, 0.5)):
        RecordsFile(directory.metrics).write({"step": step, "held_out/accuracy": accuracy})
    RecordsFile(directory.metrics).write({"step": 3})
    report = read_report(directory.path)
    assert report.last_checkpoint == 10
    assert [alarm["alarm"] for alarm in report.alarms] == ["truncation"]
    assert report.held_out == {"step": 2, "accuracy": 0.5}
    assert (report.state, report.step) == ("unknown", 3)  # a run of a version that wrote no status


def test_people_get_lines_and_a_table(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    with KeptStatus(directory.status, steps=10):
        see(directory, **{"step/tokens_per_second": 1234.0, "held_out/accuracy": 0.5})
        assert main(["status", str(directory.path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("r: running, step 4 of 10, ")
    assert "1,234 completion tokens/s" in shown
    assert "held-out after step 4: accuracy 0.5" in shown
    assert "teacher-main: models/b (0123456789ab)" in shown
    [row] = [line for line in shown.splitlines() if "rollout" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        "rollout",
        "1/2",
        "1",
        "12",
        "4",
        "75%",
        "25%",
        "500",
    ]


def test_json_is_the_same_report(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    see(directory)
    assert main(["status", str(directory.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == msgspec.to_builtins(read_report(directory.path))


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"preceptor: {tmp_path}: holds no run (there is no config.json)\n"


def test_a_damaged_status_is_one_sentence(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    directory.status.write_text('{"state": "asleep"}')
    assert main(["status", str(directory.path)]) == 1
    assert f"{directory.status}: not a run's status" in capsys.readouterr().err


def test_a_resumed_run_shows_the_steps_that_it_does_now(directory: RunDirectory) -> None:
    with KeptStatus(directory.status, steps=25):  # as --resume run.steps=25 does; config.json says 10
        assert read_report(directory.path).steps == 25
