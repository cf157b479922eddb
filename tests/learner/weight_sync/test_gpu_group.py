"""A sync over vLLM's own process group, with its store in the place of NCCL: every rank meets, and every byte arrives.

NCCL itself and CUDA are all that is missing: ranks rendezvous by the messages that real engines get, and the receiving
side reads what is broadcast as vLLM's does.
"""

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import Store
from vllm.distributed.utils import StatelessProcessGroup

from cluster.weight_sync.joint_group import Meeting
from learner.weight_sync.gpu_links import NcclLink
from tests.learner.weight_sync.fake_gpus import BUCKET_BYTES, FakeRecipients, Publication, assert_all_arrived, received

TENSOR_PARALLEL = 2
HOST = "127.0.0.1"
SECONDS = 30.0  # for all ranks to meet; a rank too many or too few waits for ever


class StoreGroup:
    """vLLM's communicator as far as the sender knows it, over the group's store."""

    disabled = False

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._group = StatelessProcessGroup(rank=rank, world_size=world_size, store=store)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> Tensor:
        return self._group.broadcast(tensor, src)


class StoreJoin:
    """Joins as `NcclJoin` does."""

    def join(self, store: Store, rank: int, world_size: int) -> StoreGroup:
        return StoreGroup(store, rank, world_size)

    def abort(self) -> None:
        pass


class EngineRank:
    """One rank of a rollout engine, in a thread of its own."""

    def __init__(self, rank_in_engine: int) -> None:
        self._rank_in_engine = rank_in_engine
        self._thread = ThreadPoolExecutor(1)
        self._messages: list[Mapping[str, Any]] = []
        self._payloads: list[Tensor] = []

    @property
    def weights(self) -> dict[str, Tensor]:
        return received(self._messages, self._payloads)

    def ask(self, method: str, argument: Any) -> "Future[None]":
        return self._thread.submit(getattr(self, method), argument)

    def start_weight_update(self, first: Sequence[Any]) -> None:
        self._messages, self._payloads = [], []

    def init_weight_transfer(self, message: Mapping[str, Any]) -> None:
        rank = message["rank_offset"] + self._rank_in_engine
        where = message["master_address"], message["master_port"], message["world_size"]
        self._group = Meeting(*where, rank).form(StoreJoin())

    def update_weights(self, message: Mapping[str, Any]) -> None:
        self._messages.append(message)
        self._payloads.append(self._group.broadcast(torch.empty(0), 0))

    def finish_weight_update(self, policy_version: int) -> None:
        assert_all_arrived(self.weights)

    def close(self) -> None:
        self._thread.shutdown()


class Ranks(FakeRecipients):
    """Engines of two ranks each; both answer what the engine is asked."""

    def call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        return {
            position: [rank.ask(method, arguments[position]) for rank in engine]
            for position, engine in self.workers.items()
        }

    def poll(self, references: Mapping[int, Any]) -> None:
        for one in (one for of_ranks in references.values() for one in of_ranks if one.done()):
            one.result()

    def answers(
        self, references: Mapping[int, Any], what_for: str, on_death: Callable[[], float | None] = lambda: None
    ) -> dict[int, Any]:
        return {position: [one.result(SECONDS) for one in of_ranks] for position, of_ranks in references.items()}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def engines() -> Iterator[list[list[EngineRank]]]:
    with ExitStack() as stack:
        engines = [[EngineRank(rank) for rank in range(TENSOR_PARALLEL)] for _ in range(3)]
        for engine in engines:
            for rank in engine:
                stack.callback(rank.close)
        yield engines


def test_all_ranks_of_all_engines_meet_and_receive_the_same(engines: list[list[EngineRank]]) -> None:
    def form(meeting: Meeting, is_given_up: Callable[[], bool]) -> StoreGroup:
        group: StoreGroup = meeting.form(StoreJoin(), is_given_up)
        return group

    def make_link(buffer: Tensor) -> NcclLink:
        most = max(BUCKET_BYTES, buffer.numel())
        return NcclLink(True, lambda: (HOST, free_port()), TENSOR_PARALLEL, most, form)

    publication = Publication(make_link, recipients=Ranks)
    first, second, third = engines
    sender: Any = publication.sender
    sender.publish([first, second], 1)
    sender.publish([first, second], 2)  # over the same group
    for rank in (*first, *second):
        assert_all_arrived(rank.weights)
    for rank in third:
        assert rank.weights == {}
