"""How weights go from card to card: the ranks, the messages, the bytes, and the order of things; no card is needed.

The receiving ends are vLLM's, which run on CUDA only. Their rules are taken from vLLM itself where it can be called
here: its dataclasses check the messages, `pack_tensors` cuts what is sent as its consumer does, and `unpack_tensor`
reads what arrives.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferInitInfo, NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

from cluster.contracts.config import WeightSyncConfig
from cluster.contracts.errors import WeightSyncError
from cluster.contracts.weights import TensorSpec, WeightManifest, plan_buckets, total_bytes
from learner.card_links import HANDLE_FIELDS, IpcLink, NcclLink, first_rank
from learner.vllm_weight_sender import VllmSender, ipc_link
from rollout_workers.ipc_receiver import rebuild_arguments

PARAMETERS = {
    "embed.weight": torch.arange(24.0).view(6, 4),  # 48 bytes in bfloat16: more than a bucket
    "norm.weight": torch.tensor([0.5, -1.0, 2.0]),
    "proj.weight": torch.arange(8.0).view(2, 4),
    "scale": torch.tensor([3.0]),
}
BUCKET_BYTES = 22


class FakeStudent:
    def manifest(self, dtype: str) -> WeightManifest:
        return WeightManifest(tuple(TensorSpec(name, tuple(v.shape), dtype) for name, v in PARAMETERS.items()))


class FakeEngine:
    """Gathers parameters, and notes which ones at a time."""

    world_size = 1

    def __init__(self, rank: int = 0) -> None:
        self.rank, self.student = rank, FakeStudent()
        self.gathered: list[list[str]] = []

    @contextmanager
    def full_parameters(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        self.gathered.append(list(names))
        yield {name: PARAMETERS[name] for name in names}


class FakeGroup:
    """Stands for NCCL: hands what is broadcast to every receiver."""

    disabled = False

    def __init__(self) -> None:
        self.broadcasts: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        assert src == 0
        self.broadcasts.append(tensor.clone())


class FakeAudience:
    """Stands for rollout actors: notes what each is told; those in `mortal` are gone when a verb comes the nth time."""

    def __init__(self, workers: Sequence[str], mortal: Mapping[str, tuple[str, int]]) -> None:
        self.workers = dict(enumerate(workers))
        self.told: list[tuple[str, dict[int, Any]]] = []
        self._mortal = mortal

    def call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        self.told.append((method, {position: arguments[position] for position in self.workers}))
        calls = sum(verb == method for verb, _ in self.told)
        return {position: self._mortal.get(worker) == (method, calls) for position, worker in self.workers.items()}

    def answers(self, references: Mapping[int, Any], what_for: str) -> dict[int, Any]:
        self.workers = {p: w for p, w in self.workers.items() if not references.get(p, False)}
        return dict.fromkeys(self.workers)

    def messages(self, method: str) -> list[dict[int, Any]]:
        return [arguments for verb, arguments in self.told if verb == method]


class Publication:
    """A sender over fakes, and what became of its publications."""

    def __init__(
        self,
        make_link: Callable[[Tensor], Any],
        mortal: Mapping[str, tuple[str, int]] | None = None,
        audience: type[FakeAudience] = FakeAudience,
    ) -> None:
        self.engine = FakeEngine()
        self.audiences: list[FakeAudience] = []
        self.ends: list[int] = []

        def listen(workers: Sequence[Any], timeout_seconds: float) -> Any:
            self.audiences.append(audience(workers, mortal or {}))
            return self.audiences[-1]

        config = WeightSyncConfig(bucket_bytes=BUCKET_BYTES)
        engine: Any = self.engine
        self.sender = VllmSender(engine, config, "bfloat16", 1.0, make_link, listen, self.ends.append)

    def publish(self, *workers: str, version: int = 1) -> Any:
        return self.sender.publish(list(workers), version)


def nccl(groups: list[FakeGroup], tensor_parallel: int = 1, is_sender: bool = True) -> Callable[[Tensor], NcclLink]:
    ports = iter(range(5000, 6000))

    def join(**meeting: Any) -> FakeGroup:
        groups.append(FakeGroup())
        return groups[-1]

    return lambda buffer: NcclLink(
        is_sender, lambda: ("10.0.0.1", next(ports)), tensor_parallel, max(BUCKET_BYTES, buffer.numel()), join
    )


def received(messages: Sequence[Mapping[str, Any]], payloads: Sequence[Tensor]) -> dict[str, Tensor]:
    """Read payloads as vLLM's receiving end does."""
    found: dict[str, Tensor] = {}
    for message, payload in zip(messages, payloads, strict=True):
        dtypes = [getattr(torch, name) for name in message["dtype_names"]]
        sizes = [
            torch.Size(shape).numel() * dtype.itemsize for shape, dtype in zip(message["shapes"], dtypes, strict=True)
        ]
        found |= dict(unpack_tensor(payload, message["names"], message["shapes"], dtypes, sizes))
    return found


def assert_all_arrived(found: Mapping[str, Tensor]) -> None:
    assert list(found) == list(PARAMETERS)
    for name, value in PARAMETERS.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value.to(torch.bfloat16))


def test_an_engines_ranks_follow_those_of_the_engine_before() -> None:
    link = nccl([], tensor_parallel=4)(torch.empty(0))
    invitations = link.invite(3)
    assert [message["rank_offset"] for message in invitations] == [1, 5, 9]
    assert {message["world_size"] for message in invitations} == {13}  # the learner's rank 0 and 3 x 4
    assert first_rank(0, 8) == 1  # an engine of any size begins behind the learner
    for message in invitations:
        assert NCCLWeightTransferInitInfo(**message).world_size == 13  # vLLM takes the message as it is


def test_every_worker_gets_every_parameter_from_one_broadcast_per_bucket() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    report = publication.publish("a", "b", "c")
    [group], [audience] = groups, publication.audiences
    updates = audience.messages("update_weights")
    assert [len(update) for update in updates] == [3, 3, 3]
    assert [update[0]["names"] for update in updates] == [["embed.weight"], ["norm.weight", "proj.weight"], ["scale"]]
    assert [payload.numel() for payload in group.broadcasts] == [48, 22, 2]
    assert_all_arrived(received([update[2] for update in updates], group.broadcasts))
    assert report.num_bytes == 72
    assert [verb for verb, _ in audience.told] == [
        "start_weight_update",
        "init_weight_transfer",
        "update_weights",
        "update_weights",
        "update_weights",
        "finish_weight_update",
    ]


def test_one_bucket_at_a_time_is_gathered() -> None:
    publication = Publication(nccl([]))
    publication.publish("a")
    assert publication.engine.gathered == [["embed.weight"], ["norm.weight", "proj.weight"], ["scale"]]


def test_a_rank_that_does_not_send_gathers_and_tells_nobody() -> None:
    publication = Publication(nccl([], is_sender=False))
    publication.engine.rank = 1
    publication.publish("a")
    assert len(publication.engine.gathered) == 3
    assert publication.audiences == []


def test_a_bucket_is_one_message_by_the_rule_of_vllms_receiver() -> None:
    specs = FakeStudent().manifest("bfloat16").tensors
    most = 48  # what the link names as the size: the largest tensor's, which is above the bucket
    for bucket in plan_buckets(specs, BUCKET_BYTES):
        pairs = iter([(spec.name, PARAMETERS[spec.name].to(torch.bfloat16)) for spec in bucket])
        chunk = pack_tensors(pairs, lambda pair: pair[1], most)
        assert chunk is not None
        assert chunk.names == [spec.name for spec in bucket]
        assert chunk.packed_tensor.numel() == total_bytes(bucket)
        assert pack_tensors(pairs, lambda pair: pair[1], most) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_parameter_begins_at_a_multiple_of_its_values_width(dtype: str) -> None:
    width = 4 if dtype == "float32" else 2
    for bucket in plan_buckets(FakeStudent().manifest(dtype).tensors, BUCKET_BYTES):
        starts = [total_bytes(bucket[:position]) for position in range(len(bucket))]
        assert all(start % width == 0 for start in starts)


def test_vllm_takes_the_messages_of_both_links() -> None:
    bucket = FakeStudent().manifest("bfloat16").tensors[1:3]
    broadcast = NCCLWeightTransferUpdateInfo(**nccl([])(torch.empty(0)).update_message(bucket))
    assert (broadcast.names, broadcast.dtype_names) == (["norm.weight", "proj.weight"], ["bfloat16", "bfloat16"])
    assert broadcast.shapes == [[3], [2, 4]]
    message = in_place({"GPU-0": 1}).update_message(bucket)
    shared = IPCWeightTransferUpdateInfo(**message)
    assert shared.tensor_sizes == [6, 16]
    assert shared.ipc_handles == {"GPU-0": 1}


def test_the_same_workers_keep_their_group_and_others_get_another_at_another_port() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish("a", "b")
    publication.publish("a", "b", version=2)
    assert len(groups) == 1
    publication.publish("a", "d", version=3)
    assert len(groups) == 2
    ports = [audience.messages("init_weight_transfer") for audience in publication.audiences]
    assert [[invitation[0]["master_port"] for invitation in found] for found in ports] == [[5000], [], [5001]]


def test_a_worker_that_dies_before_the_broadcast_is_left_out_of_the_group() -> None:
    publication = Publication(nccl([]), mortal={"b": ("start_weight_update", 1)})
    publication.publish("a", "b", "c")
    [invitation] = publication.audiences[0].messages("init_weight_transfer")
    assert {position: message["rank_offset"] for position, message in invitation.items()} == {0: 1, 2: 2}
    assert {message["world_size"] for message in invitation.values()} == {3}
    assert publication.ends == []


def test_a_death_in_a_broadcast_ends_the_learners_rank() -> None:
    publication = Publication(nccl([]), mortal={"b": ("update_weights", 2)})
    publication.publish("a", "b")
    assert publication.ends[0] == 1


def test_a_death_beside_a_shared_buffer_ends_nothing() -> None:
    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}), mortal={"b": ("update_weights", 2)})
    publication.publish("a", "b")
    assert publication.ends == []
    finished = publication.audiences[0].messages("finish_weight_update")
    assert finished == [{0: 1}]


def test_without_workers_nothing_is_connected_or_sent() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish()
    assert groups == []


def test_a_group_that_does_not_form_is_one_sentence() -> None:
    def refuse(**meeting: Any) -> None:
        raise RuntimeError("timed out")

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 2, BUCKET_BYTES, refuse)
    link.invite(2)
    with pytest.raises(WeightSyncError, match="the NCCL group of 5 ranks did not form: timed out"):
        link.open()


def test_a_communicator_without_nccl_is_refused() -> None:
    class Disabled(FakeGroup):
        disabled = True

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 1, BUCKET_BYTES, lambda **meeting: Disabled())
    link.invite(1)
    with pytest.raises(WeightSyncError, match="no NCCL library"):
        link.open()


def in_place(handles: Mapping[str, Any]) -> IpcLink:
    [(card, handle)] = handles.items()
    return IpcLink(torch.empty(0), card, lambda value: [value], lambda: None, lambda buffer: handle)


def test_a_shared_buffer_is_read_before_the_next_bucket_overwrites_it() -> None:
    read: list[tuple[dict[str, Any], Tensor]] = []

    class Reader(FakeAudience):
        """Reads the buffer when its answer is awaited, as late as can be."""

        def answers(self, references: Mapping[int, Any], what_for: str) -> dict[int, Any]:
            if references and what_for.startswith("receive"):
                message = self.messages("update_weights")[-1][0]
                [buffer] = message["ipc_handles"].values()
                read.append((message, buffer[: sum(message["tensor_sizes"])].clone()))
            return super().answers(references, what_for)

    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}), audience=Reader)
    publication.publish("a")
    assert_all_arrived(received([message for message, _ in read], [payload for _, payload in read]))


def test_every_engine_finds_the_buffer_of_its_own_card() -> None:
    gathered = [{"GPU-0": "first"}, {"GPU-1": "second"}]
    link = IpcLink(torch.empty(0), "GPU-1", lambda value: gathered, lambda: None, lambda buffer: "second")
    assert link.update_message(())["ipc_handles"] == {"GPU-0": "first", "GPU-1": "second"}


def test_a_buffer_outside_a_card_is_not_shared() -> None:
    with pytest.raises(WeightSyncError, match="the learner has none"):
        ipc_link(torch.empty(1, dtype=torch.uint8))


def test_a_handle_in_plain_values_becomes_what_torch_wants() -> None:
    names = list(inspect.signature(rebuild_cuda_tensor).parameters)
    plain = {name: [position] if name in ("size", "stride") else position for name, position in HANDLE_FIELDS.items()}
    arguments = rebuild_arguments(plain)
    assert len(arguments) == len(names) == 15
    for name, position in HANDLE_FIELDS.items():
        expected = (position,) if name in ("size", "stride") else position
        assert arguments[position] == expected
    torchs = {
        "size": "tensor_size",
        "stride": "tensor_stride",
        "offset": "tensor_offset",
        "device": "storage_device",
        "memory_handle": "storage_handle",
        "storage_bytes": "storage_size_bytes",
        "counter_handle": "ref_counter_handle",
        "counter_offset": "ref_counter_offset",
    }
    assert {names[position] for position in HANDLE_FIELDS.values()} == {
        torchs.get(name, name) for name in HANDLE_FIELDS
    }


def test_a_message_has_only_fields_that_this_vllm_knows() -> None:
    known = {field.name for field in fields(NCCLWeightTransferUpdateInfo)}
    assert set(nccl([])(torch.empty(0)).update_message(())) <= known
