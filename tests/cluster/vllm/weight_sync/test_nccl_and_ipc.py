"""An engine that joins one NCCL group after another, and takes weights without one."""

import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import Store
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

from cluster.vllm.weight_sync import nccl_and_ipc
from cluster.vllm.weight_sync.nccl_and_ipc import NcclReceiver
from cluster.vllm.weight_sync.shared_memory import shared_memory
from cluster.vllm.weight_sync.updates import UpdateCalls
from cluster.weight_sync.joint_group import Meeting
from cluster.weight_sync.manifest import new_digest


class AsksForItsRank(Exception):
    """vLLM joins the next group from here on."""


class Watched:
    """An engine's ranks, and the group that it is in; notes what is done with either."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @property
    def data_parallel_index(self) -> int:
        self.events.append("join")
        raise AsksForItsRank

    def destroy(self) -> None:
        self.events.append("leave")


def test_the_group_before_is_left_before_another_is_joined() -> None:
    watched: Any = Watched()
    settings: Any = SimpleNamespace(parallel_config=watched, model_config=None)
    config: Any = None
    receiver = NcclReceiver(config, settings, torch.device("cpu"), torch.nn.Module())
    receiver.model_update_group = watched
    invitation = NCCLWeightTransferInitInfo(master_address="10.0.0.1", master_port=1, rank_offset=1, world_size=2)
    with pytest.raises(AsksForItsRank):
        receiver.init_transfer_engine(invitation)
    assert watched.events == ["leave", "join"]
    with pytest.raises(AsksForItsRank):  # as after a group that did not form
        receiver.init_transfer_engine(invitation)
    assert watched.events == ["leave", "join", "join"]


class Tiny(torch.nn.Module):
    """Takes parameters by their names, as vLLM's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))
        self.bias = torch.nn.Parameter(torch.zeros(2))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = set()
        for name, value in weights:
            self.get_parameter(name).data.copy_(value)
            loaded.add(name)
        return loaded


def store_message(name: str, values: torch.Tensor, path: str, digest: Any) -> dict[str, Any]:
    digest.update(values.numpy().tobytes())
    message = {"names": [name], "dtypes": ["float32"], "shapes": [list(values.shape)], "path": path}
    return message | {"num_bytes": values.numel() * 4, "checksum": digest.hexdigest()}


@pytest.mark.parametrize("sent", [("weight", "bias"), ("weight",)])
def test_an_engine_outside_the_group_takes_weights_by_the_object_store(sent: tuple[str, ...]) -> None:
    settings: Any = SimpleNamespace(parallel_config=None, model_config=None)
    config: Any = None
    model = Tiny()
    receiver = NcclReceiver(config, settings, torch.device("cpu"), model)
    values = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([7.0, 8.0])}
    for _ in range(2):  # the second update forgets the first
        digest = new_digest()
        receiver.begin()
        for name in sent:
            with shared_memory(values[name].numpy().tobytes()) as path:
                receiver.receive_weights(receiver.parse_update_info(store_message(name, values[name], path, digest)))
        report = receiver.end()
        missing = None if len(sent) == 2 else "the update lacks bias"
        assert report == {"checksum": digest.hexdigest(), "fault": missing}
    assert torch.equal(model.weight.data, values["weight"])
    receiver.begin()
    assert receiver.end() == {"checksum": "unverified", "fault": None}  # as after broadcasts


class Waiting:
    """A group whose other ranks are gone: its broadcast waits until it is left, and then comes back without a word."""

    disabled = False

    def __init__(self) -> None:
        self._is_left = Event()

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        assert self._is_left.wait(30)

    def destroy(self) -> None:
        self._is_left.set()


class Sending(Waiting):
    """A group that brings the same bytes at each broadcast."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        tensor.copy_(torch.arange(8.0).view(torch.uint8))


class Joins:
    """Joins one group after another, as `NcclJoin` does."""

    groups: list[Waiting]

    def join(self, store: Store, rank: int, world_size: int) -> Waiting:
        return self.groups.pop(0) if rank else Waiting()

    def abort(self) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> NcclReceiver:
    """Return vLLM's receiver without what it needs of CUDA, which is its streams."""
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, count: [stream] * count)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(nccl_and_ipc, "NcclJoin", Joins)
    parallel: Any = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    settings: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    config: Any = None
    return NcclReceiver(config, settings, torch.device("cpu"), Tiny())


def invite(receiver: NcclReceiver) -> Meeting:
    """Let the receiver join a group, and return the first rank's end."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    first = Meeting("127.0.0.1", port, 2, 0)
    where = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    packing = {"packed": True, "packed_buffer_size_bytes": 32, "packed_num_buffers": 1}
    with ThreadPoolExecutor(1) as thread:
        forming = thread.submit(first.form, Joins())
        receiver.init_transfer_engine(receiver.parse_init_info(where | packing))
        forming.result()
    return first


def test_an_engine_is_freed_from_a_broadcast_that_is_given_up_and_takes_all_weights_from_the_next_group(
    receiver: NcclReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Joins, "groups", [Waiting(), Sending()], raising=False)
    message = {"names": ["weight", "bias"], "dtype_names": ["float32", "float32"], "shapes": [[2, 3], [2]]}
    first = invite(receiver)
    receiver.begin()
    first.give_up("a rollout worker died")
    receiver.receive_weights(receiver.parse_update_info(message))
    assert receiver.end()["fault"] == "the group of the broadcast was given up: a rollout worker died"
    _next = invite(receiver)
    receiver.begin()
    receiver.receive_weights(receiver.parse_update_info(message))
    assert receiver.end() == {"checksum": "unverified", "fault": None}
    assert torch.equal(receiver.model.weight.data, torch.arange(6.0).view(2, 3))
    assert torch.equal(receiver.model.bias.data, torch.tensor([6.0, 7.0]))


class Worker:
    """vLLM's worker, which begins no update while another is open, and ends none that is not."""

    def __init__(self) -> None:
        self.is_open = False
        self.weight_transfer_engine: Any = SimpleNamespace(begin=lambda: None, end=lambda: {"fault": None})

    def start_weight_update(self) -> None:
        assert not self.is_open
        self.is_open = True

    def finish_weight_update(self) -> None:
        assert self.is_open
        self.is_open = False


class ExtendedWorker(UpdateCalls, Worker):
    """As vLLM makes of both."""

    start_weight_update = Worker.start_weight_update  # type: ignore[assignment]
    finish_weight_update = Worker.finish_weight_update  # type: ignore[assignment]


def test_an_update_that_never_ended_makes_way_for_the_next() -> None:
    worker = ExtendedWorker()
    for _ in range(2):
        worker.begin_update()
        worker.begin_update()
        assert worker.finish_and_report() == {"fault": None}
        assert not worker.is_open
