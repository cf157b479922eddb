"""Plans every worker onto a node, with its share of the cluster, before anything starts."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import msgspec
import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.config.run_config import Config
from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import PlacementError
from cluster.placement.bin_packing import CPU_UNITS, Demand, NodeCapacity, largest_equal_share, pack
from cluster.placement.gpu_sharing import share_gpu
from cluster.vllm.engine import SHARED_GPU_VARIABLE
from cluster.weight_sync.transports import choose

CHECK_SECONDS = 1.0  # between two checks of what is free
PATIENCE_SECONDS = 3.0  # what Ray says of a node that has just started, or of actors that have just ended, is late
LEARNER = "learner"


@dataclass(frozen=True)
class NodeResources:
    """Describes what one node offers to Ray."""

    cpus: float
    gpus: int
    node_id: str = ""  # Ray's; "": workers do not ask for it

    @property
    def capacity(self) -> NodeCapacity:
        return NodeCapacity.of(self.cpus, self.gpus)


@dataclass(frozen=True)
class PoolPlacement:
    """Describes one pool's or group's share of the cluster."""

    name: str  # "rollout", "teacher-NAME", "slot-NAME" or "learner"
    num_workers: int
    gpus_per_worker: float  # below 1: its part of a shared GPU
    cpus_per_worker: float  # what Ray reserves
    cpu_threads: int  # what the worker's own kernels may use of the node's cores
    nodes: tuple[NodeResources, ...]  # one per worker

    @property
    def share(self) -> dict[str, Any]:
        """Return Ray actor options of a worker that has no node of its own."""
        # Ray would set the threads from the reserved CPUs: a fraction, or with a GPU one, with which an optimizer in
        # host memory takes ten times as long.
        variables = {"OMP_NUM_THREADS": str(self.cpu_threads)}
        if 0 < self.gpus_per_worker < 1:
            variables[SHARED_GPU_VARIABLE] = "1"
        return {
            "num_cpus": self.cpus_per_worker,
            "num_gpus": self.gpus_per_worker,
            "runtime_env": {"env_vars": variables},
        }

    def options(self) -> list[dict[str, Any]]:
        # Soft: a worker whose node is dead goes to any other with room; while its node lives, its share waits there.
        return [
            self.share
            | ({"scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=True)} if node.node_id else {})
            for node in self.nodes[: self.num_workers]
        ]


@dataclass(frozen=True)
class Placement:
    """Holds every pool's share."""

    rollout: PoolPlacement
    teachers: dict[str, PoolPlacement]  # those of a slot have one share together
    learner: PoolPlacement

    @property
    def pools(self) -> list[PoolPlacement]:
        return [self.rollout, *{share.name: share for share in self.teachers.values()}.values(), self.learner]

    @property
    def on_gpu(self) -> bool:
        return self.learner.gpus_per_worker > 0


def cluster_nodes() -> list[NodeResources]:
    """Ask the connected Ray cluster for its live nodes."""
    return [
        NodeResources(node["Resources"].get("CPU", 0.0), int(node["Resources"].get("GPU", 0)), node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_nodes(nodes: Sequence[NodeResources]) -> list[NodeResources]:
    """Ask the connected Ray cluster what is left of its nodes."""
    left = available_resources_per_node()
    return [
        replace(
            node,
            cpus=left.get(node.node_id, {}).get("CPU", 0.0),
            gpus=int(left.get(node.node_id, {}).get("GPU", 0)),
        )
        for node in nodes
    ]


def await_placement(config: Config, say: Callable[[str], None]) -> Placement:
    """Plan on what is free, waiting up to ray.start_timeout_seconds for what others use; then raise PlacementError."""
    limit = config.ray.start_timeout_seconds
    began = time.monotonic()
    has_said = False
    while True:
        nodes = cluster_nodes()
        plan_placement(config, nodes)
        try:
            return plan_placement(config, nodes, free_nodes(nodes))
        except PlacementError as error:
            waited = time.monotonic() - began
            if waited >= limit:
                raise PlacementError(
                    f"waited {limit:.0f} s (ray.start_timeout_seconds) for what others use: {error}"
                ) from error
            if waited >= PATIENCE_SECONDS and not has_said:
                say(f"waiting up to {limit:.0f} s for what others use: {error}")
                has_said = True
        time.sleep(min(CHECK_SECONDS, limit))


def plan_placement(
    config: Config, nodes: Sequence[NodeResources], free: Sequence[NodeResources] | None = None
) -> Placement:
    """Give every worker its share of a node.

    With GPUs, each worker reserves whole ones, or its part of the one that all share. Without, the pools take turns on
    the same cores: each engine gets the node's cores divided by the number of its engines, and the learner all of them,
    since it works while engines wait. `free` is what others leave of the same nodes; None: all of it.

    Raises:
        PlacementError: what the run needs is not there; says how much is needed and there, and for which pool.
    """
    if floor(max((node.cpus for node in nodes), default=0)) < 1:
        raise PlacementError("the Ray cluster offers no CPU; start it with at least one")
    on_gpu = any(node.gpus for node in nodes)
    choose(config, on_gpu)  # refuses what cannot work there
    if on_gpu and config.ray.share_gpu:
        return _on_one_gpu(config, nodes, free)
    demands = _demands(config, nodes)
    capacities = [node.capacity for node in (nodes if free is None else free)]
    places = pack(demands, capacities, _where(demands, nodes, free))
    threads = _threads(config, nodes, places)
    pools = {demand.pool: _placed(demand, nodes, places[demand.pool], threads[demand.pool]) for demand in demands}
    teachers = {name: pools[label] for label, names in config.scorer_groups.items() for name in names}
    return Placement(pools["rollout"], teachers, pools[LEARNER])


def describe(placement: Placement) -> list[tuple[str, str]]:
    """Return a line per pool, (pool, share), for people."""
    lines = []
    for pool in placement.pools:
        kind = f"{pool.gpus_per_worker:.2g} GPU" if pool.gpus_per_worker else f"{pool.cpu_threads} CPU threads"
        nodes = len(set(pool.nodes))
        lines.append((pool.name, f"{pool.num_workers} x {kind}" + (f" on {nodes} nodes" if nodes > 1 else "")))
    return lines


def _on_one_gpu(config: Config, nodes: Sequence[NodeResources], free: Sequence[NodeResources] | None) -> Placement:
    """Put all workers on one node, where they share the CPUs as without a GPU, and give each its part of one GPU."""
    shares = share_gpu(config)
    left = nodes if free is None else free
    # Of a node's GPUs, Ray takes a part of any that has it: a worker that starts again would land beside the others.
    hosts = [position for position, node in enumerate(left) if node.gpus and nodes[position].gpus == 1]
    if not hosts and any(node.gpus for node in left):
        raise PlacementError(
            f"ray.share_gpu needs a node with one GPU, and {len(nodes)} nodes have more each or one in use; start Ray "
            "on a node with --num-gpus 1"
        )
    if not hosts:
        raise PlacementError(f"ray.share_gpu needs one GPU that nobody uses, and none is free on {len(nodes)} nodes")
    host = max(hosts, key=lambda position: left[position].cpus)
    without_gpu = replace(left[host], gpus=0)
    on_cpu = msgspec.structs.replace(
        config, ray=msgspec.structs.replace(config.ray, share_gpu=False), weight_sync=WeightSyncConfig()
    )
    placed = plan_placement(on_cpu, [replace(nodes[host], gpus=0)], [without_gpu])
    threads = config.rollout.engine.cpu_threads or 1
    return Placement(
        replace(placed.rollout, gpus_per_worker=shares.rollout, cpu_threads=threads),
        {name: replace(pool, gpus_per_worker=shares.teachers[name]) for name, pool in placed.teachers.items()},
        replace(placed.learner, gpus_per_worker=shares.learner),
    )


def _demands(config: Config, nodes: Sequence[NodeResources]) -> list[Demand]:
    engines = {"rollout": (config.rollout.num_workers, config.rollout.engine.tensor_parallel)}
    for label, (first, *_) in config.scorer_groups.items():
        engines[label] = (config.teachers[first].num_workers, config.teachers[first].engine.tensor_parallel)
    workers = sum(count for count, _ in engines.values()) + config.learner.num_workers
    on_gpu = any(node.gpus for node in nodes)
    # Fractions without GPUs: Ray schedules by reservation, and the stages share the cores in turns.
    cpu_units = CPU_UNITS if on_gpu else max(1, largest_equal_share([node.capacity for node in nodes], workers))
    demands = [
        Demand(pool, count, NodeCapacity(cpu_units, gpus if on_gpu else 0)) for pool, (count, gpus) in engines.items()
    ]
    learner = Demand(LEARNER, config.learner.num_workers, NodeCapacity(cpu_units, int(on_gpu)), together=True)
    return [*demands, learner]


def _where(demands: Sequence[Demand], nodes: Sequence[NodeResources], free: Sequence[NodeResources] | None) -> str:
    on_gpu = any(node.gpus for node in nodes)
    needed = sum(demand.num_workers * (demand.share.gpus or demand.share.cpu_units / CPU_UNITS) for demand in demands)
    total, left = (sum(node.gpus if on_gpu else node.cpus for node in some) for some in (nodes, free or ()))
    has = f"the cluster has {total:g}" if free is None else f"{left:g} of the cluster's {total:g} are free"
    # Workers with one GPU each would do with a part of it, except the ranks of a group.
    parts_do = all(demand.share.gpus == 1 and (demand.num_workers == 1 or not demand.together) for demand in demands)
    advice = "; ray.share_gpu = true puts all of it on one GPU" if on_gpu and needed > total and parts_do else ""
    return f"the run needs {needed:g} {'GPUs' if on_gpu else 'CPUs'} and {has} on {len(nodes)} nodes{advice}"


def _placed(demand: Demand, nodes: Sequence[NodeResources], places: Sequence[int], threads: int) -> PoolPlacement:
    share = demand.share
    where = tuple(nodes[place] for place in places)
    return PoolPlacement(demand.pool, demand.num_workers, share.gpus, share.cpu_units / CPU_UNITS, threads, where)


def _threads(config: Config, nodes: Sequence[NodeResources], places: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the threads of each pool's workers: as set, else what the fullest of its nodes allows.

    With GPUs all workers of a node compute at the same time, but for rollout workers, whose threads would wait.
    """
    on_gpu = any(node.gpus for node in nodes)
    ranks = Counter(places[LEARNER])
    engines = Counter(node for pool, taken in places.items() if pool != LEARNER for node in taken)
    if on_gpu:
        ranks = engines = Counter(node for taken in places.values() for node in taken)
    wanted = {
        "rollout": config.rollout.engine.cpu_threads or (1 if on_gpu else None),
        LEARNER: config.learner.cpu_threads,
    }
    wanted |= {
        label: next((threads for name in names if (threads := config.teachers[name].engine.cpu_threads)), None)
        for label, names in config.scorer_groups.items()
    }

    def fair(pool: str) -> int:
        on_node = ranks if pool == LEARNER else engines
        return min((max(1, floor(nodes[node].cpus) // on_node[node]) for node in places[pool]), default=1)

    return {pool: wanted[pool] or fair(pool) for pool in places}
