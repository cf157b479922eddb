"""What the cluster has left for more workers."""

import ray

from cluster.placement import PoolPlacement

RESOURCES = {"num_gpus": "GPU", "num_cpus": "CPU"}  # Ray's actor option -> what it calls the resource


def missing_for(share: PoolPlacement, more: int) -> str | None:
    """Say what the connected cluster lacks for so many more workers of a pool; None when it has room.

    Looks at sums: an engine on several GPUs also needs them on one node, which Ray finds out when it places the actor.
    """
    free, total = ray.available_resources(), ray.cluster_resources()
    for option, resource in RESOURCES.items():
        needed = more * share.options()[0][option]
        if needed > free.get(resource, 0.0):
            return (
                f"{more} more workers need {needed:g} {resource}s, and {free.get(resource, 0.0):g} of the cluster's "
                f"{total.get(resource, 0.0):g} are free"
            )
    return None
