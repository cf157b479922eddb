"""Finds what the cluster has left for more workers, and whether its nodes hold another split of the present ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray._private.state import actors, available_resources_per_node
from ray.actor import ActorHandle

from cluster.placement.placement import PoolPlacement


def missing_for(*changes: tuple[PoolPlacement, int]) -> str | None:
    """Say what the connected cluster lacks for changes of pools' workers, together; None when it has room.

    Workers that leave make room for those that come. Workers without GPUs take turns on the same cores, so there always
    is some. Compares sums: an engine on several GPUs also needs them on one node, which Ray finds out when it places
    the actor.
    """
    more = sum(change for _, change in changes if change > 0)
    needed = sum(change * share.gpus_per_worker for share, change in changes if change > 0)
    left = sum(-change * share.gpus_per_worker for share, change in changes if change < 0)
    free, whose = _free_gpus(changes)
    if needed <= free + left:
        return None
    others = f", with {left:g} more when others leave" if left else ""
    return f"{more} more workers need {needed:g} GPUs, and {free:g} {whose} are free{others}"


def _free_gpus(changes: Sequence[tuple[PoolPlacement, int]]) -> tuple[float, str]:
    """Return how many GPUs workers may still have, and of which."""
    for share, _ in changes:
        if 0 < share.gpus_per_worker < 1 and share.nodes:
            # Weights reach only engines on the GPU that the run shares, which is its node's only one.
            return available_resources_per_node().get(share.nodes[0].node_id, {}).get("GPU", 0.0), "of the shared one"
    total = ray.cluster_resources().get("GPU", 0.0)
    return ray.available_resources().get("GPU", 0.0), f"of the cluster's {total:g}"


@dataclass
class SplitCapacity:
    """Tracks the GPUs of every node, and on which of them each pool's workers are.

    Example:
        >>> capacity = SplitCapacity({"rollout": 1, "teachers.main": 2})
        >>> capacity.update({"a": 0, "b": 0}, {"rollout": ["a", "b", "b"], "teachers.main": ["a"]})
        >>> capacity.fits({"rollout": 1, "teachers.main": 2}), capacity.fits({"rollout": 2, "teachers.main": 2})
        (True, False)
    """

    gpus: Mapping[str, int]  # of a worker, by pool
    _free: Mapping[str, int] = field(default_factory=dict)  # by node
    _homes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # nodes of a pool's workers, the last leave first

    def read(self, workers: Mapping[str, Sequence[ActorHandle]]) -> None:
        """Ask the connected cluster what is free, and where these workers are, by pool."""
        if not any(self.gpus.values()):
            return
        free = {node: int(left.get("GPU", 0)) for node, left in available_resources_per_node().items()}
        node_of = {actor: state["Address"]["NodeID"] for actor, state in actors().items()}
        self.update(free, {name: [node_of[worker._actor_id.hex()] for worker in own] for name, own in workers.items()})

    def update(self, free: Mapping[str, int], homes: Mapping[str, Sequence[str]]) -> None:
        """Take in free GPUs by node, and the node of each pool's workers, those first that stay."""
        self._free, self._homes = free, homes

    def fits(self, sizes: Mapping[str, int]) -> bool:
        """Return whether the nodes hold the workers that come, each whole, when those that go have left."""
        if not any(self.gpus.values()):
            return True
        free = Counter(self._free)
        for name, size in sizes.items():
            for node in self._homes[name][size:]:
                free[node] += self.gpus[name]
        coming = [self.gpus[name] for name, size in sizes.items() for _ in range(size - len(self._homes[name]))]
        for needed in sorted(coming, reverse=True):
            large_enough = [node for node in free if free[node] >= needed]
            if not large_enough:
                return False
            free[min(large_enough, key=free.__getitem__)] -= needed
        return True
