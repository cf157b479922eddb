"""An engine that joins one NCCL group after another."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo

from cluster.vllm.weight_sync.nccl_and_ipc import NcclReceiver


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
