"""Places pools on a cluster of several raylets and says where their actors are, before and after a node is lost.

python -m tests.cluster.placement.placed_actors SCENARIO
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import ActorDiedError

from cluster.actors.cluster import RAY
from cluster.contracts.errors import PlacementError
from cluster.placement.gpus import smallest_gpu, visible_gpus
from cluster.placement.placement import Placement, await_placement
from tests.builders import make_config

ANSWER_SECONDS = 120
RESTARTS = 3  # ray.max_restarts of a run that does not set it


class Somebody:
    """An actor that knows where it is."""

    def node(self) -> str:
        """Return the node's id."""
        return str(ray.get_runtime_context().get_node_id())


def main() -> None:
    """Run one scenario and print what it found."""
    scenarios: dict[str, Callable[[Cluster], Any]] = {
        "gpus": on_gpus,
        "cpus": on_cpus,
        "lost": after_a_loss,
        "busy": while_others_work,
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        print(json.dumps(scenarios[sys.argv[1]](cluster)))  # noqa: T201
    finally:
        ray.shutdown()
        cluster.shutdown()


def on_gpus(cluster: Cluster) -> dict[str, Any]:
    """Two nodes of four GPUs: an engine of four, three generators, one rank; and what NVML says there of GPUs."""
    names = add_nodes(cluster, (4, 4), (4, 4))
    placement = place("rollout.num_workers=3", "teachers.main.engine.tensor_parallel=4")
    placed = {pool.name: where(start(pool.options()), names) for pool in placement.pools}
    return {**placed, "smallest_gpu": smallest_gpu([*names]), "gpus_here": visible_gpus()}


def on_cpus(cluster: Cluster) -> dict[str, list[int]]:
    """Two nodes of two CPUs for five workers."""
    names = add_nodes(cluster, (2, 0), (2, 0))
    placement = place("rollout.num_workers=2", "teachers.main.num_workers=2")
    return {pool.name: where(start(pool.options()), names) for pool in placement.pools}


def after_a_loss(cluster: Cluster) -> dict[str, Any]:
    """Three nodes, one with nothing to do; the node of a replica is lost, and the replica is started again."""
    nodes = [cluster.add_node(num_cpus=2, num_gpus=1) for _ in range(4)]
    names = {node.node_id: number for number, node in enumerate(nodes)}
    placement = place()
    [generator] = start(placement.rollout.options())
    others = [actor for pool in placement.pools[1:] for actor in start(pool.options())]
    taken = where([generator, *others], names)
    cluster.remove_node(nodes[taken[0]], allow_graceful=False)
    return {"before": taken, "again": start_again(placement.rollout.options(), names)}


def start_again(options: list[dict[str, Any]], names: dict[str, int]) -> list[int]:
    """Start an actor once more where Ray, not knowing of the node's death yet, put it there; as pools do."""
    for _ in range(RESTARTS):
        with suppress(ActorDiedError):
            return where(start(options), names)
    return where(start(options), names)


def while_others_work(cluster: Cluster) -> dict[str, Any]:
    """Three GPUs, one of which somebody uses until after the first try."""
    names = add_nodes(cluster, (4, 3))
    [other] = RAY.create(
        "tests.cluster.placement.placed_actors:Somebody", ["other"], [()], [{"num_gpus": 1, "num_cpus": 1}]
    )
    ray.get(other.node.remote(), timeout=ANSWER_SECONDS)
    said: list[str] = []
    try:
        await_placement(make_config("ray.start_timeout_seconds=5"), said.append)
        refused = ""
    except PlacementError as error:
        refused = str(error)
    ray.kill(other)
    placement = await_placement(make_config(), lambda sentence: None)  # Ray may free the GPU a moment later
    return {"said": said, "refused": refused, "then": where(start(placement.learner.options()), names)}


def add_nodes(cluster: Cluster, *sizes: tuple[int, int]) -> dict[str, int]:
    """Add nodes of so many CPUs and GPUs, and return their numbers by Ray's ids."""
    nodes = [cluster.add_node(num_cpus=cpus, num_gpus=gpus) for cpus, gpus in sizes]
    return {node.node_id: number for number, node in enumerate(nodes)}


def place(*overrides: str) -> Placement:
    return await_placement(make_config(*overrides), lambda sentence: None)


def start(options: list[dict[str, Any]]) -> list[Any]:
    """Start an actor for each share, of any name."""
    remote = ray.remote(Somebody)
    return [remote.options(**option).remote() for option in options]


def where(actors: list[Any], names: dict[str, int]) -> list[int]:
    return [names[node] for node in ray.get([actor.node.remote() for actor in actors], timeout=ANSWER_SECONDS)]


if __name__ == "__main__":
    main()
