"""Why a process ended is in what it printed last."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.actors.worker_output import KEPT_FILES, keep, last_error


@pytest.mark.parametrize(
    ("printed", "error"),
    [
        (
            "(EngineCore pid=7) ERROR 11-30 04:28:04 [core.py:1512] RuntimeError: head_dim=16\n"
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n",
            "RuntimeError: head_dim=16",
        ),
        ("(EngineCore pid=7) ERROR 11-30 04:28:04 [core.py:1512] AssertionError\n", "AssertionError"),
        ("ValueError: the first\nan answer\nKeyError: 'the last'\n", "KeyError: 'the last'"),
        ("torch.OutOfMemoryError: CUDA out of memory.\n", "torch.OutOfMemoryError: CUDA out of memory."),
        ("Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n", "Fatal Python error: S"),
        ("terminate called\n  what():  std::bad_alloc\n", "what():  std::bad_alloc"),
        ("RuntimeError: Engine core initialization failed. See root cause above.\n", ""),
        ("a word about an Error: none\n", ""),
        ("", ""),
    ],
)
def test_the_last_error_is_that_of_the_process_and_not_of_those_who_wait_for_it(printed: str, error: str) -> None:
    assert last_error(printed).startswith(error)
    assert bool(last_error(printed)) == bool(error)


def test_a_process_reads_the_end_of_what_it_and_its_children_printed_to_files(tmp_path: Path) -> None:
    log, answer = tmp_path / "worker.out", tmp_path / "answer"
    code = (
        "import os, pathlib, sys; from cluster.actors.worker_output import own_output; "
        "os.system('echo a child'); pathlib.Path(sys.argv[1]).write_text(own_output())"
    )
    with log.open("w") as stdout:
        subprocess.run([sys.executable, "-c", code, str(answer)], stdout=stdout, stderr=subprocess.PIPE, check=True)
    assert answer.read_text() == "a child\n"


def test_a_run_keeps_the_output_of_its_latest_failures_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "run/logs"
    for number in range(KEPT_FILES + 2):
        path = keep(folder, f"rollout-{number:03}", f"output {number}")
        assert path is not None
    assert path.read_text() == f"output {KEPT_FILES + 1}"
    assert (path.stat().st_mode & 0o777, folder.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len(list(folder.iterdir())) == KEPT_FILES


def test_a_folder_that_cannot_be_written_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    assert keep(tmp_path / "logs", "rollout-0", "output") is None


def test_only_the_end_of_a_long_output_is_kept(tmp_path: Path) -> None:
    log, answer = tmp_path / "worker.out", tmp_path / "answer"
    code = (
        "import pathlib, sys; from cluster.actors import worker_output as w; w.KEPT_BYTES = 4; "
        "print('12345', flush=True); pathlib.Path(sys.argv[1]).write_text(w.own_output())"
    )
    with log.open("w") as stdout:
        subprocess.run([sys.executable, "-c", code, str(answer)], stdout=stdout, stderr=subprocess.PIPE, check=True)
    assert answer.read_text() == "345\n"
