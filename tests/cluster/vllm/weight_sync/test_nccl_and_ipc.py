"""An engine that joins one NCCL group after another, and takes weights without one."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

from cluster.vllm.weight_sync.nccl_and_ipc import NcclReceiver
from cluster.vllm.weight_sync.shared_memory import shared_memory
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
