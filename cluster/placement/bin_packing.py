"""Packs workers onto nodes: engines apart from each other, the learner's ranks together, no node overfull."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.contracts.errors import PlacementError

CPU_UNITS = 10_000  # Ray counts resources in ten-thousandths; whole numbers of them add up exactly


@dataclass(frozen=True)
class NodeCapacity:
    """Counts what a node offers, or what a worker reserves.

    Example:
        >>> NodeCapacity(cpu_units=20_000, gpus=4).times_that_fit(NodeCapacity(cpu_units=10_000, gpus=1))
        2
    """

    cpu_units: int
    gpus: int

    @classmethod
    def of(cls, cpus: float, gpus: int) -> "NodeCapacity":
        return cls(int(cpus * CPU_UNITS + 0.5), gpus)

    def less(self, other: "NodeCapacity", times: int = 1) -> "NodeCapacity":
        return NodeCapacity(self.cpu_units - times * other.cpu_units, self.gpus - times * other.gpus)

    def times_that_fit(self, other: "NodeCapacity") -> int:
        """Return how often `other`, which has at least one CPU unit, fits in here."""
        by_cpu = self.cpu_units // other.cpu_units
        return min(by_cpu, self.gpus // other.gpus) if other.gpus else by_cpu


@dataclass(frozen=True)
class Demand:
    """Describes the workers of one pool or group, which are all alike."""

    pool: str
    num_workers: int
    share: NodeCapacity  # of one worker
    together: bool = False  # whether the workers talk to each other at every step


def largest_equal_share(capacities: Sequence[NodeCapacity], workers: int) -> int:
    """Return the most CPU units, up to one CPU, that each of `workers` can have without being split over nodes.

    Example:
        >>> largest_equal_share([NodeCapacity.of(2, 0), NodeCapacity.of(2, 0)], workers=5)
        6666
    """
    shares = {min(CPU_UNITS, capacity.cpu_units // count) for capacity in capacities for count in range(1, workers + 1)}
    fitting = [
        share for share in shares if share and sum(capacity.cpu_units // share for capacity in capacities) >= workers
    ]
    return max(fitting, default=0)


def pack(demands: Sequence[Demand], capacities: Sequence[NodeCapacity], where: str) -> dict[str, tuple[int, ...]]:
    """Return the node, as a position in `capacities`, of every worker of every pool.

    First the groups are put on as few nodes as can be and the pools spread over what is left. Where that leaves no room
    for a worker, everything goes as close together as it can, widest workers first.

    Raises:
        PlacementError: a worker fits nowhere; says which, what it needs, and `where`, the cluster and what it has.
    """
    groups_first = sorted(demands, key=lambda demand: (not demand.together, -demand.share.gpus))
    try:
        return _arrange(groups_first, _Nodes(capacities, where), tightly=False)
    except PlacementError:
        widest_first = sorted(demands, key=lambda demand: (-demand.share.gpus, demand.together))
        return _arrange(widest_first, _Nodes(capacities, where), tightly=True)


class _Nodes:
    """Counts what is left on every node while workers take their shares."""

    def __init__(self, capacities: Iterable[NodeCapacity], where: str) -> None:
        self.left = list(capacities)
        self._where = where

    def fitting(self, share: NodeCapacity) -> list[int]:
        return [node for node, capacity in enumerate(self.left) if capacity.times_that_fit(share)]

    def take(self, node: int, share: NodeCapacity, times: int = 1) -> None:
        self.left[node] = self.left[node].less(share, times)

    def refuse(self, demand: Demand, worker: int) -> PlacementError:
        share = demand.share
        most = max((capacity.gpus for capacity in self.left), default=0)
        if share.gpus > most:
            needs = f"{share.gpus} GPUs on one node, {most} are left"
        else:
            beside = f" beside {share.gpus} GPUs" if share.gpus else ""
            needs = f"{share.cpu_units / CPU_UNITS:g} CPUs{beside} on one node, and no node has that left"
        return PlacementError(f"{demand.pool} worker {worker} needs {needs}; {self._where}")


def _arrange(demands: Sequence[Demand], nodes: _Nodes, tightly: bool) -> dict[str, tuple[int, ...]]:
    return {
        demand.pool: _together(demand, nodes) if demand.together else _one_by_one(demand, nodes, tightly)
        for demand in demands
    }


def _together(demand: Demand, nodes: _Nodes) -> tuple[int, ...]:
    """Fill the smallest node that holds all, else the largest and go on with the rest."""
    places: list[int] = []
    while len(places) < demand.num_workers:
        missing = demand.num_workers - len(places)
        fits = {node: nodes.left[node].times_that_fit(demand.share) for node in nodes.fitting(demand.share)}
        if not fits:
            raise nodes.refuse(demand, len(places))
        whole = [node for node in fits if fits[node] >= missing]
        node = min(whole, key=fits.__getitem__) if whole else max(fits, key=fits.__getitem__)
        times = min(missing, fits[node])
        nodes.take(node, demand.share, times)
        places += [node] * times
    return tuple(places)


def _one_by_one(demand: Demand, nodes: _Nodes, tightly: bool) -> tuple[int, ...]:
    """Put each worker on the fullest node that holds it, or on the one with the fewest workers of its pool."""
    places: list[int] = []
    mates: Counter[int] = Counter()

    def looseness(node: int) -> tuple[int, int, int]:
        capacity = nodes.left[node]
        return (0 if tightly else -mates[node], capacity.gpus, capacity.cpu_units)

    for worker in range(demand.num_workers):
        fitting = nodes.fitting(demand.share)
        if not fitting:
            raise nodes.refuse(demand, worker)
        node = min(fitting, key=looseness) if tightly else max(fitting, key=looseness)
        nodes.take(node, demand.share)
        mates[node] += 1
        places.append(node)
    return tuple(places)
