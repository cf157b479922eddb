"""Brings a bucket of weights from a buffer on the learner's GPU to the GPUs of rollout engines.

`NcclLink` is for engines on GPUs of their own: rank 0 broadcasts to all their ranks at once. `IpcLink` is for engines
that share a GPU with a rank of the learner: they read that rank's buffer in place. The receiving ends are vLLM's, with
`cluster/vllm/weight_sync/nccl_and_ipc.py` in front, which drops the fields that an older vLLM does not know.
"""

from collections.abc import Callable
from threading import Event
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.ipc_handles import plain_handle
from cluster.weight_sync.joint_group import Meeting
from cluster.weight_sync.manifest import Bucket


class Link(Protocol):
    """Connects one rank of the learner with the rollout engines."""

    fills_buffer: bool  # whether this rank's buffer is read
    is_read_in_place: bool  # whether the buffer is in use until the workers have answered

    def invite(self, num_workers: int) -> list[dict[str, Any]]:
        """Return what each worker needs to open its end."""

    def open(self) -> None:
        """Join the invited workers, while they open their ends; raise WeightSyncError if it fails."""

    def give_up(self) -> None:
        """Let an `open` under way fail; called by another thread."""

    def update_message(self, bucket: Bucket) -> dict[str, Any]:
        """Return what a worker needs to receive one bucket."""

    def settle(self) -> None:
        """Wait until every rank has come here and its buffer holds what it was filled with."""

    def carry(self, values: Tensor) -> None:
        """Send the filled part of the buffer to workers that have its `update_message`; it may wait for ever."""

    def break_off(self, reason: str) -> None:
        """Free this rank and the workers from a `carry` that will not end; called by another thread."""


class NcclLink:
    """Broadcasts in an NCCL group of the learner's rank 0 and all ranks of all rollout engines.

    Args:
        is_sender: whether this is rank 0 of the learner; the others have no part in the group.
        choose_address: returns host and port where a group can meet; each group has one of its own.
        tensor_parallel: ranks of each rollout engine.
        bucket_bytes: the most that one message holds, but for a single larger tensor.
        form_group: joins the group as a meeting says, unless what it is passed becomes true; None: by NCCL.
    """

    is_read_in_place = False  # what fills the buffer next is on the same stream

    def __init__(
        self,
        is_sender: bool,
        choose_address: Callable[[], tuple[str, int]],
        tensor_parallel: int,
        bucket_bytes: int,
        form_group: Callable[[Meeting, Callable[[], bool]], Any] | None = None,
    ) -> None:
        self.fills_buffer = is_sender
        self._choose_address = choose_address
        self._tensor_parallel = tensor_parallel
        # One buffer at the receiving end: every message is one bucket.
        self._packing = {"packed": True, "packed_buffer_size_bytes": bucket_bytes, "packed_num_buffers": 1}
        self._form_group = form_group or _form_by_nccl
        self._group: Any = None
        self._meeting: Meeting  # of the group that was invited last; workers that come late are told there
        self._is_given_up = Event()

    def invite(self, num_workers: int) -> list[dict[str, Any]]:
        """Return each worker's first rank; its other ranks follow."""
        host, port = self._choose_address()
        world_size = first_rank(num_workers, self._tensor_parallel)
        self._meeting, self._is_given_up = Meeting(host, port, world_size, rank=0), Event()
        common = {"master_address": host, "master_port": port, "world_size": world_size} | self._packing
        return [common | {"rank_offset": first_rank(worker, self._tensor_parallel)} for worker in range(num_workers)]

    def open(self) -> None:
        """Join as rank 0, giving up the group before; raise WeightSyncError if the group does not form."""
        before, self._group = self._group, None
        if before is not None:
            before.destroy()
        group = self._form_group(self._meeting, self._is_given_up.is_set)
        if group.disabled:
            # vLLM's communicator then does nothing, and the workers would wait for ever.
            raise WeightSyncError("vLLM found no NCCL library on the learner's node; set weight_sync.transport")
        self._group = group

    def give_up(self) -> None:
        self._is_given_up.set()

    def update_message(self, bucket: Bucket) -> dict[str, Any]:
        """Describe the parameters that the next broadcast holds, one after the other."""
        return describe(bucket) | self._packing

    def settle(self) -> None:
        """Do nothing: the broadcast follows the filling on the same stream."""

    def carry(self, values: Tensor) -> None:
        """Broadcast on the stream that filled the buffer, for vLLM's default may be another, and wait for its end.

        NCCL comes back as soon as the GPU has the work, and what waits for a dead rank is the GPU.
        """
        stream = torch.cuda.current_stream() if values.is_cuda else None
        self._group.broadcast(values, src=0, stream=stream)
        if stream is not None:
            stream.synchronize()

    def break_off(self, reason: str) -> None:
        group, self._group = self._group, None
        self._meeting.give_up(reason)  # the workers watch for it
        if group is not None:
            group.destroy()


class IpcLink:
    """Shares a buffer of each rank of the learner with the engines on its GPU.

    A buffer is exported once and stays: torch counts the readers of an export, and with several engines on one GPU the
    count of a second export would never come out even.

    Args:
        buffer: of bytes, on this rank's GPU; all buckets pass through it.
        gpu: the GPU's UUID.
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
        for of_rank in all_gather({gpu: handle}):
            self._handles |= of_rank

    def invite(self, num_workers: int) -> list[dict[str, Any]]:
        return [{"packed": True}] * num_workers

    def open(self) -> None:
        """Do nothing: every message says where the buffers are."""

    def give_up(self) -> None:
        """Do nothing: `open` does not wait."""

    def update_message(self, bucket: Bucket) -> dict[str, Any]:
        """Say where the parameters stand, on every GPU that has a rank of the learner."""
        sizes = [tensor.num_bytes for tensor in bucket]
        return describe(bucket) | {"ipc_handles": self._handles, "tensor_sizes": sizes, "packed": True}

    def settle(self) -> None:
        self._synchronize()
        self._all_gather(None)

    def carry(self, values: Tensor) -> None:
        """Do nothing: the workers read the buffer."""

    def break_off(self, reason: str) -> None:
        """Do nothing: `carry` does not wait."""


def _form_by_nccl(meeting: Meeting, is_given_up: Callable[[], bool]) -> Any:
    from cluster.vllm.weight_sync.nccl_and_ipc import NcclJoin  # vLLM, which nothing else in the learner needs

    return meeting.form(NcclJoin(), is_given_up)


def first_rank(worker: int, tensor_parallel: int) -> int:
    """Return the NCCL rank of an engine's first rank; for the number of engines, the size of the group.

    Example:
        >>> [first_rank(worker, tensor_parallel=2) for worker in range(4)]  # learner 0, engines 1-2, 3-4, 5-6
        [1, 3, 5, 7]
    """
    return 1 + worker * tensor_parallel  # the learner's rank 0 alone sends


def describe(bucket: Bucket) -> dict[str, Any]:
    """Return names, dtypes and shapes as both of vLLM's engines take them."""
    return {
        "names": [tensor.name for tensor in bucket],
        "dtype_names": [tensor.dtype for tensor in bucket],
        "shapes": [list(tensor.shape) for tensor in bucket],
    }


def gather_from_ranks(value: Any) -> list[Any]:
    """Return every learner rank's value, in order."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
