"""The disk of the run directory is full: on a file system of a few megabytes in a mount namespace of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.config.run_directory import RunDirectory
from cluster.run.checkpoints import find_resume_point

SMALL_DISK = 'mount -t tmpfs -o size=10m tmpfs "$0" || exit 90; "${@:2}"; code=$?; cp -r "$0/." "$1"; exit $code'
TIMEOUT_SECONDS = 300


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS + 60)
def test_a_full_disk_ends_the_run_in_one_sentence_and_leaves_the_earlier_checkpoints(tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    overrides = [
        "run.steps=20",
        "prompts.prompts_per_step=16",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=20",
        "evaluation.num_prompts=16",
        "evaluation.teacher_too=false",
        "ray.dashboard=false",
    ]
    command = [sys.executable, "-m", "cluster.cli", "demo", f"run.directory={disk}", "run.name=run", *overrides]
    found = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", SMALL_DISK, str(disk), str(kept), *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert found.returncode == 1, found.stdout + found.stderr
    assert "No space left on device" in found.stderr
    assert "Traceback" not in found.stderr
    run = RunDirectory.open(kept / "run")
    warnings: list[str] = []
    state = find_resume_point(run, run.read_config(), warnings.append)
    assert state is not None
    assert warnings == []
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == sorted(f"step-{step}" for step in range(1, state.step + 1))
