"""`python -m tests.chaos.nodes DIRECTORY SEED`: a run on a cluster of four raylets, of which one is killed.

Before that its rollout pool grows and its teacher's pool shrinks, after that the other way round.
"""

import random
import sys
import threading
import time
from pathlib import Path

from ray.cluster_utils import Cluster

from benchmarks.cases.chaos import DISTURBED, last_record
from cluster.commands import start_training
from cluster.config.run_directory import RunDirectory
from cluster.demo import embedded_config
from cluster.elastic.scale import ask
from cluster.elastic.splits import describe_sizes

NUM_NODES = 3  # besides the head, which holds the driver only
STEPS = 60


def overrides(directory: Path) -> list[str]:
    """Return the run's settings."""
    return [
        f"run.directory={directory}",
        "run.name=run",
        f"run.steps={STEPS}",
        "prompts.prompts_per_step=32",
        "checkpoint.every_steps=2",
        "evaluation.num_prompts=32",
        *DISTURBED,
    ]


def main() -> None:
    """Train, and lose a node on the way."""
    directory, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=4) for _ in range(NUM_NODES)]
        trouble = (cluster, chance.choice(nodes), directory / "run", chance.randrange(10, STEPS // 2))
        threading.Thread(target=disturb, args=trouble, daemon=True).start()
        start_training(embedded_config([*overrides(directory), f"ray.address={cluster.address}"]))
    finally:
        cluster.shutdown()


def disturb(cluster: Cluster, node: object, run: Path, step: int) -> None:
    """Change the sizes of the pools, kill a node once a step is done, and change the sizes back."""
    wait_for(run, 2)
    report(describe_sizes(ask(RunDirectory(run).scaling, {"rollout": 3, "teachers.countdown": 1}).sizes))
    wait_for(run, step)
    cluster.remove_node(node, allow_graceful=False)
    report(f"node lost after step {step}")
    wait_for(run, step + 2)
    report(describe_sizes(ask(RunDirectory(run).scaling, {"rollout": 2, "teachers.countdown": 2}).sizes))


def wait_for(run: Path, step: int) -> None:
    """Wait until a step is done."""
    while last_record(run).get("step", 0) < step:
        time.sleep(0.1)


def report(line: str) -> None:
    """Tell the test."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
