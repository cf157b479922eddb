import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases.cluster_life import SubmittedRun, look_back, workers_on
from benchmarks.harness.ray_cluster import Door


class KnownDoor(Door):
    """A cluster of two nodes that is not asked."""

    def ask(self, path: str) -> Any:
        nodes = [{"node_id": "a", "node_ip": "10.0.0.1"}, {"node_id": "b", "node_ip": "10.0.0.2"}]
        actors = [
            {"name": "rollout-0", "class_name": "RolloutActor", "node_id": "a"},
            {"name": "learner-0", "class_name": "LearnerActor", "node_id": "b"},
            {"name": "_ray_internal_job_actor_x", "class_name": "JobSupervisor", "node_id": "a"},
        ]
        return {"data": {"result": {"result": nodes if "/nodes" in path else actors}}}


class FinishedRun(SubmittedRun):
    """A run that was not started."""

    def __post_init__(self) -> None:
        self.started = 0.0


def records(*steps: Mapping[str, float]) -> str:
    return "".join(f"{json.dumps(step)}\n" for step in steps)


def test_workers_of_the_run_are_told_from_rays_own_and_by_their_host(tmp_path: Path) -> None:
    door = KnownDoor("http://10.0.0.1:8265", tmp_path / "token", tmp_path)
    assert workers_on(door, "10.0.0.1") == ["rollout-0"]
    assert workers_on(door, "10.0.0.2") == ["learner-0"]
    assert workers_on(door, "10.0.0.3") == []


def test_a_life_is_read_from_figures_and_output(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, last = {"pool/rollout/restarts": 1}, {"pool/rollout/restarts": 3, "pool/learner/restarts": 1, "step": 2}
    (tmp_path / "run/metrics.jsonl").write_text(records(first, last))
    # Step 2 was done twice: the run went back to its checkpoint.
    (tmp_path / "out").write_text("preceptor: submitted\nstep 1  KL\nstep 2  KL\nstep 2  KL\nscaled: step 9\n")
    door = Door("", tmp_path, tmp_path)
    life = look_back(FinishedRun(door, tmp_path / "run", tmp_path / "out", ()), ["learner-0"])
    assert (life.restarts, life.followed_steps, life.lost) == (4, 2, ["learner-0"])
