"""The receiving end of a weight sync over NCCL: vLLM's `nccl` engine, which may join one group after another.

A group spans a fixed set of workers, so another is formed whenever one of them starts again, comes or leaves.
"""

from typing import Any

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

from cluster.vllm_versions import REUSES_STREAMS


class NcclReceiver(NCCLWeightTransferEngine):
    """Leaves the group that was there before."""

    model_update_group: PyNcclCommunicator | None

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join a group; vLLM would forget the one before, whose buffers would stay on the card for good."""
        if self.model_update_group is not None:
            self.model_update_group.destroy()
            self.model_update_group = None
        super().init_transfer_engine(init_info)

    def receive_weights(self, *arguments: Any, **loader: Any) -> None:
        """Receive one bucket, and keep no memory for a stream that never comes back."""
        super().receive_weights(*arguments, **loader)
        if not REUSES_STREAMS:
            torch.cuda.empty_cache()
