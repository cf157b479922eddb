"""A node of a cluster dies with everything on it, workers and the batches in its object store, and pools are scaled."""

import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.cases.chaos import audited_prompts
from tests.chaos.nodes import STEPS, overrides

TIMEOUT_SECONDS = 600
SHARED_MEMORY = Path("/dev/shm")
SEMAPHORES = "sem.mp-*"


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS + 60)
def test_every_prompt_is_consumed_once_though_pools_change_their_sizes_and_a_node_dies(
    tmp_path: Path,
) -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    sys.stdout.write(f"seed {seed}\n")  # pytest shows it when the test fails
    semaphores = set(SHARED_MEMORY.glob(SEMAPHORES))
    # A cluster of several nodes is not one that the program starts itself, and cleans up after.
    with tempfile.TemporaryDirectory(prefix="n-") as folder:
        found = subprocess.run(
            [sys.executable, "-m", "tests.chaos.nodes", str(tmp_path), str(seed)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder, "RAY_TMPDIR": folder},
            check=False,
        )
    for path in set(SHARED_MEMORY.glob(SEMAPHORES)) - semaphores:
        path.unlink(missing_ok=True)  # processes of a node that is killed cannot do that
    assert found.returncode == 0, found.stdout + found.stderr
    expected = ["rollout=3 teachers.countdown=1", "node lost after step", "rollout=2 teachers.countdown=2"]
    places = [found.stdout.find(line) for line in expected]
    assert places == sorted(places)
    assert places[0] >= 0
    assert audited_prompts(tmp_path / "run", overrides(tmp_path)) == STEPS * 32
