"""What the cluster has left for more workers."""

import ray

from cluster.placement import PoolPlacement


def missing_for(share: PoolPlacement, more: int) -> str | None:
    """Say what the connected cluster lacks for so many more workers of a pool; None when it has room.

    Workers without GPUs take turns on the same cores, so there always is. Looks at the sum: an engine on several GPUs
    also needs them on one node, which Ray finds out when it places the actor.
    """
    needed, free = more * share.gpus_per_worker, ray.available_resources().get("GPU", 0.0)
    if needed <= free:
        return None
    total = ray.cluster_resources().get("GPU", 0.0)
    return f"{more} more workers need {needed} GPUs, and {free:g} of the cluster's {total:g} are free"
