"""Passes the address of a buffer on a GPU between processes that may not unpickle, in numbers and bytes."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

# Where these stand in what torch's `reduce_tensor` returns for a CUDA tensor; the rest are classes, and the event that
# a reader would wait for: the sender has waited already, and torch never closes one that it opened.
HANDLE_FIELDS = {
    "size": 1,
    "stride": 2,
    "offset": 3,
    "device": 6,
    "memory_handle": 7,
    "storage_bytes": 8,
    "storage_offset_bytes": 9,
    "counter_handle": 11,
    "counter_offset": 12,
}


def plain_handle(buffer: Tensor) -> dict[str, Any]:
    """Export a CUDA buffer and return what another process needs to open it."""
    _, arguments = reduce_tensor(buffer)
    plain = {name: arguments[position] for name, position in HANDLE_FIELDS.items()}
    return plain | {"size": list(plain["size"]), "stride": list(plain["stride"])}


def rebuild_arguments(plain: dict[str, Any]) -> tuple[Any, ...]:
    """Return what torch's `rebuild_cuda_tensor` takes for a buffer of bytes."""
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
        False,  # event_sync_required
    )
