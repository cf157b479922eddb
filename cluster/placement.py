"""Who runs where: worker counts and shares of the cluster, checked before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import Any

import ray

from cluster.contracts.config import Config
from cluster.contracts.errors import PlacementError


@dataclass(frozen=True)
class NodeResources:
    """What one node offers to Ray."""

    cpus: float
    gpus: int


@dataclass(frozen=True)
class PoolPlacement:
    """One pool's or group's share of the cluster."""

    name: str  # "rollout", "teacher-NAME" or "learner"
    num_workers: int
    gpus_per_worker: int
    cpus_per_worker: float  # what Ray reserves
    cpu_threads: int  # what the worker's kernels use when there is no GPU

    def options(self) -> list[dict[str, Any]]:
        """Return Ray actor options, one per worker."""
        share: dict[str, Any] = {"num_cpus": self.cpus_per_worker, "num_gpus": self.gpus_per_worker}
        if not self.gpus_per_worker:
            # Ray would set the threads from the reserved CPUs, which are fractions here.
            share["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(self.cpu_threads)}}
        return [share] * self.num_workers


@dataclass(frozen=True)
class Placement:
    """Every pool's share."""

    rollout: PoolPlacement
    teachers: dict[str, PoolPlacement]
    learner: PoolPlacement

    @property
    def pools(self) -> list[PoolPlacement]:
        """Return all shares in data-flow order."""
        return [self.rollout, *self.teachers.values(), self.learner]


def cluster_nodes() -> list[NodeResources]:
    """Ask the connected Ray cluster for its live nodes."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [NodeResources(found.get("CPU", 0.0), int(found.get("GPU", 0))) for found in resources]


def plan_placement(config: Config, nodes: Sequence[NodeResources]) -> Placement:
    """Give every pool its share of the nodes.

    With GPUs, each worker reserves whole ones. Without, the pools take turns on the same cores: each engine gets the
    node's cores divided by the number of engines, and the learner all of them, since it works while the engines wait.

    Raises:
        PlacementError: the GPUs that the run needs are not there; says how many are needed, found, and for whom.
    """
    on_gpu = any(node.gpus for node in nodes)
    engines = config.rollout.num_workers + sum(teacher.num_workers for teacher in config.teachers.values())
    workers = engines + config.learner.num_workers
    cores = floor(max((node.cpus for node in nodes), default=0))
    if cores < 1:
        raise PlacementError("the Ray cluster offers no CPU; start it with at least one")
    # Reserve fractions: Ray schedules by reservation, and the stages share the cores in turns.
    reserved = 1.0 if on_gpu else floor(100 * min(1.0, sum(node.cpus for node in nodes) / workers)) / 100
    engine_threads = max(1, cores // max(1, engines // len(nodes)))

    def pool(name: str, num_workers: int, gpus: int, threads: int | None, default_threads: int) -> PoolPlacement:
        return PoolPlacement(name, num_workers, gpus if on_gpu else 0, reserved, threads or default_threads)

    rollout = config.rollout
    learner_threads = max(1, cores // config.learner.num_workers)
    placement = Placement(
        pool(
            "rollout", rollout.num_workers, rollout.engine.tensor_parallel, rollout.engine.cpu_threads, engine_threads
        ),
        {
            name: pool(
                f"teacher-{name}",
                teacher.num_workers,
                teacher.engine.tensor_parallel,
                teacher.engine.cpu_threads,
                engine_threads,
            )
            for name, teacher in config.teachers.items()
        },
        pool("learner", config.learner.num_workers, 1, config.learner.cpu_threads, learner_threads),
    )
    if on_gpu:
        _check_gpus(placement, nodes)
    return placement


def describe(placement: Placement) -> list[tuple[str, str]]:
    """Return one (pool, share) line per pool, for people."""
    lines = []
    for pool in placement.pools:
        kind = f"{pool.gpus_per_worker} GPU" if pool.gpus_per_worker else f"{pool.cpu_threads} CPU threads"
        lines.append((pool.name, f"{pool.num_workers} x {kind}"))
    return lines


def _check_gpus(placement: Placement, nodes: Sequence[NodeResources]) -> None:
    """Pack the workers into the nodes, widest first; an engine's GPUs must be on one node."""
    free = [node.gpus for node in nodes]
    found, needed = sum(free), sum(pool.num_workers * pool.gpus_per_worker for pool in placement.pools)
    for pool in sorted(placement.pools, key=lambda pool: -pool.gpus_per_worker):
        for worker in range(pool.num_workers):
            node = max(range(len(free)), key=lambda index: free[index])
            if free[node] < pool.gpus_per_worker:
                raise PlacementError(
                    f"{pool.name} worker {worker} needs {pool.gpus_per_worker} GPUs on one node, {free[node]} are "
                    f"left; the run needs {needed} GPUs and the cluster has {found} on {len(nodes)} nodes"
                )
            free[node] -= pool.gpus_per_worker
