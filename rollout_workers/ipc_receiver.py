"""The receiving end of a weight sync on a shared card: vLLM's `ipc` engine, told where the weights are in plain values.

vLLM's own message holds the arguments of torch's `rebuild_cuda_tensor`, among them classes, which its processes pass to
each other only if they may unpickle whatever comes. Everything else in it is numbers and bytes.
"""

from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo


class IpcReceiver(IPCWeightTransferEngine):
    """Loads parameters from a buffer in the learner's memory on the same card."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        """Put the classes back in."""
        handles = {card: rebuild_arguments(plain) for card, plain in update_dict["ipc_handles"].items()}
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
