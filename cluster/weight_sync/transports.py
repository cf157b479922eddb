"""Chooses how new weights travel from the learner to the rollout workers."""

from typing import Literal

from cluster.config.run_config import Config
from cluster.contracts.errors import PlacementError

WeightBackend = Literal["object_store", "nccl", "ipc"]


def weight_backend(config: Config, on_gpu: bool) -> WeightBackend:
    """Return how new weights travel: as set, else the fastest way there is between the run's workers.

    Raises:
        PlacementError: what is set cannot work there.
    """
    backend, shared = config.weight_sync.backend, config.ray.share_gpu
    if backend == "object_store" or (backend == "auto" and (not on_gpu or config.weight_sync.mode == "delta")):
        return "object_store"
    if not on_gpu:
        raise PlacementError(f"weight_sync.backend = '{backend}' needs GPUs, and the cluster has none; leave it 'auto'")
    if backend == "nccl" and shared:
        raise PlacementError("weight_sync.backend = 'nccl' needs a GPU per worker; with ray.share_gpu use 'ipc'")
    if backend == "ipc" and not shared:
        raise PlacementError("weight_sync.backend = 'ipc' needs ray.share_gpu; workers on GPUs of their own use 'nccl'")
    return "ipc" if shared else "nccl"
