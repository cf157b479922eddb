"""The receiving end of a weight sync over NCCL: vLLM's `nccl` engine, which may join one group after another.

A group spans a fixed set of workers, so another is formed whenever one of them starts again, comes or leaves.
"""

from typing import Any

import torch
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

from cluster.vllm.compat import REUSES_STREAMS


class IpcReceiver(IPCWeightTransferEngine):
    """Loads parameters from a buffer in the learner's memory on the same card."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """Put the classes back in."""
        handles = {gpu: rebuild_arguments(plain) for gpu, plain in update_dict["ipc_handles"].items()}
        return super().parse_update_info(update_dict | {"ipc_handles": handles})


def rebuild_arguments(plain: dict[str, Any]) -> tuple[Any, ...]:
    """Return what `rebuild_cuda_tensor` takes for a buffer of bytes, from what `plain_handle` said of it."""
    return (
        torch.Tensor,
        torch.Size(plain["size"]),
        tuple(plain["stride"]),
        plain["offset"],
        torch.storage.TypedStorage,
        torch.uint8,
        plain["device"],
        plain["memory_handle"],
        plain["storage_bytes"],
        plain["storage_offset_bytes"],
        False,  # requires_grad
        plain["counter_handle"],
        plain["counter_offset"],
        b"",  # event_handle
        False,  # event_sync_required: the sender waits for its copying before it says anything
    )


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
