"""Joins an NCCL group by vLLM's communicator, which rollout engines broadcast with."""

from typing import Any

import torch
from torch.distributed import Store
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup

from cluster.vllm.compat import unpinned_nccl_env


class NcclJoin:
    """Makes the communicator of one rank, as a `Backend` of `cluster/weight_sync/joint_group.py`."""

    def __init__(self) -> None:
        self._device = torch.accelerator.current_device_index()  # of this thread; `join` has one of its own
        # Made before it joins: when it does not come back, its kernel is found here.
        self._communicator: Any = PyNcclCommunicator.__new__(PyNcclCommunicator)

    def join(self, store: Store, rank: int, world_size: int) -> PyNcclCommunicator:
        """Return the communicator, which is `disabled` where vLLM finds no NCCL."""
        group = StatelessProcessGroup(rank=rank, world_size=world_size, store=store)
        # Its first collective waits for all ranks on the GPU: on a stream that nothing else is on.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream()), unpinned_nccl_env():
            self._communicator.__init__(group, device=self._device)
        return self._communicator

    def abort(self) -> None:
        """End what waits on the GPU; a thread that waits for a connection is left behind, and holds nothing else."""
        if hasattr(self._communicator, "comm"):
            self._communicator.destroy()
