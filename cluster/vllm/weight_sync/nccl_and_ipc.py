"""Receives weights from GPU to GPU, by vLLM's `nccl` and `ipc` engines, and first ones of newcomers by the store."""

from typing import Any

import torch
from torch._C._distributed_c10d import Store
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

from cluster.vllm.compat import REUSES_STREAMS, taken_by, unpinned_nccl_env
from cluster.vllm.weight_sync.loading import fault_of_incomplete, tied_layers
from cluster.vllm.weight_sync.object_store import BucketMessage, ObjectStoreReceiver
from cluster.weight_sync.ipc_handles import rebuild_arguments
from cluster.weight_sync.joint_group import Meeting

PACKING_SETTINGS = dict.fromkeys(("packed", "packed_buffer_size_bytes", "packed_num_buffers"))  # of an invitation


class VllmReceiver:
    """Adapts vLLM's engines: they read the learner's messages, and report whether an update filled the model."""

    init_info_cls: type[Any]
    update_info_cls: type[Any]
    model: torch.nn.Module

    def __init__(self, *arguments: Any) -> None:  # what vLLM's releases pass differs; all end with the model
        super().__init__(*arguments)
        # Read before the first update: while one runs, vLLM gives tied layers parameters of their own.
        self._tied_layers = tied_layers(self.model)
        self._fault: str | None = None

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Drop what this vLLM does not know: 0.24 hears how weights are packed with every update, 0.3x only here."""
        vllms: Any = super()
        return vllms.parse_init_info(taken_by(self.init_info_cls, init_dict))

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        vllms: Any = super()
        return vllms.parse_update_info(taken_by(self.update_info_cls, update_dict))

    def begin(self) -> None:
        self._fault = None

    def finish_weight_update(self) -> None:
        """Look for layers that are not full, before vLLM makes do with what they have; 0.24 does not call this."""
        self._fault = self._fault or fault_of_incomplete(self.model, self._tied_layers)
        vllms: Any = super()
        vllms.finish_weight_update()

    def end(self) -> dict[str, Any]:
        """Return the outcome; what else went wrong was raised, and vLLM's own engines compute no checksum."""
        return {"checksum": "unverified", "fault": self._fault}


class IpcReceiver(VllmReceiver, IPCWeightTransferEngine):
    """Loads parameters from a buffer in the learner's memory on the same GPU."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        handles = {gpu: rebuild_arguments(plain) for gpu, plain in update_dict["ipc_handles"].items()}
        return super().parse_update_info(update_dict | {"ipc_handles": handles})


class NcclReceiver(VllmReceiver, NCCLWeightTransferEngine):
    """Receives broadcasts, and joins one group after another; until it is in one, weights come by the object store.

    A group spans a fixed set of workers, so another is formed whenever one of them starts again, comes or leaves. One
    that breaks in a broadcast, as when a rank dies, is left: the model holds nonsense then, until the learner begins
    the update anew.
    """

    model_update_group: PyNcclCommunicator | None
    _meeting: Meeting

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._store = ObjectStoreReceiver(*arguments)
        self._came_by_store = False

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join a group, or raise WeightSyncError within a limit; vLLM's own would wait for a dead rank for ever."""
        # vLLM would also forget the group before, whose buffers would stay on the GPU for good.
        before, self.model_update_group = self.model_update_group, None
        if before is not None:
            before.destroy()
        for name in taken_by(NCCLWeightTransferInitInfo, PACKING_SETTINGS):  # 0.24 hears them with every update
            setattr(self, name, getattr(init_info, name))
        own = self.parallel_config
        rank = init_info.rank_offset + own.data_parallel_index * own.world_size + own.rank
        where: tuple[Any, Any] = init_info.master_address, init_info.master_port  # `NcclLink` names both
        self._meeting = Meeting(*where, init_info.world_size, rank)
        self.model_update_group = self._meeting.form(NcclJoin())

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Return what a broadcast brings, or a bucket that lies in shared memory."""
        by_store = "path" in update_dict
        return self._store.parse_update_info(update_dict) if by_store else super().parse_update_info(update_dict)

    def begin(self) -> None:
        super().begin()
        self._store.begin()
        self._came_by_store = False

    def receive_weights(self, update_info: Any, *arguments: Any, **loader: Any) -> None:
        """Receive one bucket, and keep no memory for a stream that never comes back."""
        if isinstance(update_info, BucketMessage):
            self._came_by_store = True
            self._store.receive_weights(update_info)
            return
        group = self.model_update_group
        assert group is not None, "the learner broadcasts in the group that it invited to"
        with self._meeting.watched(group.destroy) as given_up:
            super().receive_weights(update_info, *arguments, **loader)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # 0.24 comes back before the broadcast ends
        if given_up.done():  # no exception: vLLM's update and, of several ranks, their answers would be left half open
            self._fault = f"the group of the broadcast was given up: {given_up.result()}"
        if not REUSES_STREAMS:
            torch.cuda.empty_cache()

    def end(self) -> dict[str, Any]:
        """Return the outcome, with the checksum of what came by the object store."""
        report = super().end()
        if not self._came_by_store:
            return report
        of_store = self._store.end()
        return of_store | {"fault": of_store["fault"] or report["fault"]}


class NcclJoin:
    """Makes the communicator of one rank, as a `Backend` of `Meeting`."""

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
