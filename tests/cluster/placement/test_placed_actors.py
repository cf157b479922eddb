"""Where Ray really puts the actors of a plan: clusters of several raylets, with GPUs in Ray's books only."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any

import pytest

from tests.leak_check import without_ray

pytestmark = pytest.mark.slow
# Nodes would start a Python process for each of their CPUs before any is needed.
VARIABLES = {"RAY_AUTH_MODE": "disabled", "RAY_prestart_worker_first_driver": "0"}


def placed(scenario: str) -> Any:
    """Return what a scenario found."""
    # A cluster of several nodes is not one that the program starts itself, and cleans up after.
    with tempfile.TemporaryDirectory(prefix="n-") as folder:
        found = subprocess.run(
            [sys.executable, "-m", "tests.cluster.placement.placed_actors", scenario],
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
            env={**without_ray(os.environ), **VARIABLES, "TMPDIR": folder, "RAY_TMPDIR": folder},
            check=False,
        )
    assert found.returncode == 0, found.stdout + found.stderr
    return json.loads(found.stdout.splitlines()[-1])


def test_an_engine_of_four_gpus_has_a_node_for_itself_and_the_others_share_one() -> None:
    nodes = placed("gpus")
    [engine] = nodes["teacher-main"]
    assert nodes["rollout"] + nodes["learner"] == [1 - engine] * 4
    assert nodes["smallest_gpu"] == min(nodes["gpus_here"], default=None)  # every node is this machine


def test_five_workers_start_on_two_nodes_of_two_cpus() -> None:
    nodes = placed("cpus")
    assert sorted(nodes["rollout"]) == [0, 1]
    assert sorted(nodes["teacher-main"]) == [0, 1]
    assert sorted(Counter(node for pool in nodes.values() for node in pool).values()) == [2, 3]


@pytest.mark.exhaustive
def test_a_replica_whose_node_is_lost_starts_on_another() -> None:
    found = placed("lost")
    assert len(set(found["before"])) == 3
    [again] = found["again"]
    assert again not in found["before"]


def test_a_run_waits_for_what_others_use_and_says_what_is_missing() -> None:
    found = placed("busy")
    missing = (
        "learner worker 0 needs 1 GPUs on one node, 0 are left; the run needs 3 GPUs and 2 of the cluster's 3 are free "
        "on 2 nodes"
    )
    assert found["said"] == [f"waiting up to 5 s for what others use: {missing}"]
    assert found["refused"] == f"waited 5 s (ray.start_timeout_seconds) for what others use: {missing}"
    assert found["then"] == [0]
