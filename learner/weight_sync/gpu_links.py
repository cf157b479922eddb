"""How a bucket of weights gets from a buffer on the learner's card to the cards of rollout engines.

`NcclLink` is for engines on cards of their own: rank 0 broadcasts to all their ranks at once. `IpcLink` is for engines
that share a card with a rank of the learner: they read that rank's buffer where it lies. The receiving ends are vLLM's.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo

from cluster.contracts.errors import WeightSyncError
from cluster.vllm.compat import open_nccl_group, taken_by
from learner.weight_sync.object_store import Bucket

# Where these stand in what torch's `reduce_tensor` returns for a CUDA tensor; the rest are classes, and the event that
# a reader would wait for: `settle` has waited already, and torch never closes one that it opened.
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
LEARNER_RANKS = 1  # of the NCCL group: rank 0 alone sends


class Link(Protocol):
    """What the sender asks of a link, on every rank of the learner."""

    fills_buffer: bool  # whether this rank's buffer is read
    is_read_in_place: bool  # whether the buffer is in use until the workers have answered

    def invite(self, num_workers: int) -> list[dict[str, Any]]:
        """Return what each worker needs to open its end."""

    def open(self) -> None:
        """Join the workers that were invited, while they open their ends."""

    def update_message(self, bucket: Bucket) -> dict[str, Any]:
        """Return what a worker needs to receive one bucket."""

    def settle(self) -> None:
        """Wait until every rank has come here and its buffer holds what it was filled with."""

    def carry(self, payload: Tensor) -> None:
        """Send the filled part of the buffer to workers that were told of it."""


class NcclLink:
    """One NCCL group of the learner's rank 0 and all ranks of all rollout engines.

    Args:
        is_sender: whether this is rank 0 of the learner; the others have no part in the group.
        choose_address: returns host and port where a group can meet; each group has one of its own.
        tensor_parallel: ranks of each rollout engine.
        bucket_bytes: the most that one message holds, but for a single larger tensor.
        open_group: joins the group.
    """

    is_read_in_place = False  # what fills the buffer next is on the same stream

    def __init__(
        self,
        is_sender: bool,
        choose_address: Callable[[], tuple[str, int]],
        tensor_parallel: int,
        bucket_bytes: int,
        open_group: Callable[..., Any] = open_nccl_group,
    ) -> None:
        self.fills_buffer = is_sender
        self._choose_address = choose_address
        self._tensor_parallel = tensor_parallel
        # One buffer at the receiving end: every message is one bucket.
        self._packing = {"packed": True, "packed_buffer_size_bytes": bucket_bytes, "packed_num_buffers": 1}
        self._open_group = open_group
        self._group: Any = None
        self._meeting: dict[str, Any] = {}  # of the group that was invited last

    def invite(self, num_workers: int) -> list[dict[str, Any]]:
        """Return each worker's first rank; its other ranks follow."""
        host, port = self._choose_address()
        world_size = first_rank(num_workers, self._tensor_parallel)
        self._meeting = {"master_address": host, "master_port": port, "world_size": world_size}
        common = taken_by(NCCLWeightTransferInitInfo, self._meeting | self._packing)
        return [common | {"rank_offset": first_rank(worker, self._tensor_parallel)} for worker in range(num_workers)]

    def open(self) -> None:
        """Join as rank 0; the group that was there before is given up.

        Raises:
            WeightSyncError: the group did not form.
        """
        if self._group is not None:
            self._group.destroy()
        try:
            self._group = self._open_group(**self._meeting)
        except (RuntimeError, OSError) as error:
            raise WeightSyncError(
                f"the NCCL group of {self._meeting['world_size']} ranks did not form: {error}"
            ) from error
        if self._group.disabled:
            # vLLM's communicator then does nothing, and the workers would wait for ever.
            raise WeightSyncError("vLLM found no NCCL library on the learner's node; set weight_sync.backend")

    def update_message(self, bucket: Bucket) -> dict[str, Any]:
        """Describe the parameters that the next broadcast holds, one after the other."""
        return taken_by(NCCLWeightTransferUpdateInfo, describe(bucket) | self._packing)

    def settle(self) -> None:
        """Do nothing: the broadcast follows the filling on the same stream."""

    def carry(self, payload: Tensor) -> None:
        """Broadcast, on the stream that filled the buffer; vLLM's default may be another one."""
        self._group.broadcast(payload, src=0, stream=torch.cuda.current_stream() if payload.is_cuda else None)


class IpcLink:
    """Buffers that each rank of the learner shares with the engines on its card.

    A buffer is exported once and stays: torch counts who has opened an export, and with several engines on one card the
    count of a second export would never come out even.

    Args:
        buffer: of bytes, on this rank's card; all buckets pass through it.
        card: the card's UUID.
        all_gather: returns every rank's value in order, on all ranks, and lets no rank go on before all have come.
        synchronize: waits for what was copied into the buffer.
        export: as `plain_handle`.
    """

    fills_buffer = True
    is_read_in_place = True

    def __init__(
        self,
        buffer: Tensor,
        gpu: str,
        all_gather: Callable[[Any], list[Any]],
        synchronize: Callable[[], None] = lambda: torch.cuda.current_stream().synchronize(),
        export: Callable[[Tensor], dict[str, Any]] | None = None,
    ) -> None:
        self._all_gather, self._synchronize = all_gather, synchronize
        handle = (export or plain_handle)(buffer)
        self._handles: dict[str, Any] = {}
        for found in all_gather({gpu: handle}):
            self._handles |= found

    def invite(self, num_workers: int) -> list[dict[str, Any]]:
        """Say that several parameters come in one buffer."""
        return [taken_by(IPCWeightTransferInitInfo, {"packed": True})] * num_workers

    def open(self) -> None:
        """Do nothing: every message says where the buffers are."""

    def update_message(self, bucket: Bucket) -> dict[str, Any]:
        """Say where the parameters stand, on every card that has a rank of the learner."""
        where = {
            "ipc_handles": self._handles,
            "tensor_sizes": [tensor.num_bytes for tensor in bucket],
            "packed": True,
        }
        return taken_by(IPCWeightTransferUpdateInfo, describe(bucket) | where)

    def settle(self) -> None:
        """Wait for this rank's copying, then for all ranks."""
        self._synchronize()
        self._all_gather(None)

    def carry(self, payload: Tensor) -> None:
        """Do nothing: the workers read the buffer."""


def first_rank(worker: int, tensor_parallel: int) -> int:
    """Return the NCCL rank of an engine's first rank; for the number of engines, the size of the group.

    Example:
        >>> [first_rank(worker, tensor_parallel=2) for worker in range(4)]  # learner 0, engines 1-2, 3-4, 5-6
        [1, 3, 5, 7]
    """
    return LEARNER_RANKS + worker * tensor_parallel


def describe(bucket: Bucket) -> dict[str, Any]:
    """Return names, dtypes and shapes as both of vLLM's engines take them."""
    return {
        "names": [tensor.name for tensor in bucket],
        "dtype_names": [tensor.dtype for tensor in bucket],
        "shapes": [list(tensor.shape) for tensor in bucket],
    }


def plain_handle(buffer: Tensor) -> dict[str, Any]:
    """Export a CUDA buffer and return what another process needs to open it, in numbers and bytes."""
    _, arguments = reduce_tensor(buffer)
    plain = {name: arguments[position] for name, position in HANDLE_FIELDS.items()}
    return plain | {"size": list(plain["size"]), "stride": list(plain["stride"])}


def gather_from_ranks(value: Any) -> list[Any]:
    """Return every learner rank's value, in order."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
