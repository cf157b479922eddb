"""`python -m tests.chaos.nodes DIRECTORY SEED`: a run on a cluster of four raylets, of which one is killed."""

import random
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from benchmarks.chaos import last_record
from cluster.commands import start_training
from cluster.demo import embedded_config

NUM_NODES = 3  # besides the head, which holds the driver only
STEPS = 12


def overrides(directory: Path) -> list[str]:
    """Return the run's settings."""
    return [
        f"run.directory={directory}",
        "run.name=run",
        f"run.steps={STEPS}",
        "prompts.prompts_per_step=32",
        "rollout.num_workers=2",
        "teachers.countdown.num_workers=2",
        "checkpoint.every_steps=2",
        "checkpoint.export=false",
        "evaluation.num_prompts=32",
        "evaluation.teacher_too=false",
        "ray.max_restarts=20",
    ]


def main() -> None:
    """Train, and lose a node on the way."""
    directory, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=4) for _ in range(NUM_NODES)]
        victim, step = chance.randrange(NUM_NODES), chance.randrange(2, STEPS - 2)
        threading.Thread(target=lose, args=(cluster, nodes[victim], directory / "run", step), daemon=True).start()
        start_training(embedded_config([*overrides(directory), f"ray.address={cluster.address}"]))
    finally:
        cluster.shutdown()


def lose(cluster: Cluster, node: object, run: Path, step: int) -> None:
    """Kill a node once a step is done."""
    while last_record(run).get("step", 0) < step:
        time.sleep(0.1)
    cluster.remove_node(node, allow_graceful=False)
    sys.stdout.write(f"node lost after step {step}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
