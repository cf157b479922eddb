"""Weights go from GPU to GPU: the ranks, the messages, the bytes, and the order of things; no GPU is needed.

The receiving ends are vLLM's, which run on CUDA only. Their rules are taken from vLLM itself where it can be called
here: its dataclasses check the messages, `pack_tensors` cuts what is sent as its consumer does, and `unpack_tensor`
reads what arrives.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

from cluster.contracts.errors import ActorError, WeightSyncError
from cluster.vllm.weight_sync.nccl_and_ipc import IpcReceiver, NcclReceiver, VllmReceiver
from cluster.weight_sync.ipc_handles import HANDLE_FIELDS, rebuild_arguments
from cluster.weight_sync.joint_group import Meeting
from cluster.weight_sync.manifest import plan_buckets, total_bytes
from learner.model.student import Student
from learner.weight_sync import gpu_update
from learner.weight_sync.gpu_links import IpcLink, NcclLink, describe, first_rank
from learner.weight_sync.gpu_sender import ipc_link, refuse_expandable_segments, some_sleep
from tests.builders import make_config
from tests.learner.weight_sync.fake_gpus import (
    BUCKET_BYTES,
    PARAMETERS,
    FakeGroup,
    FakeRecipients,
    FakeStudent,
    Publication,
    assert_all_arrived,
    in_place,
    nccl,
    received,
)

TINY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


PLAIN_HANDLE = {name: [0] if name in ("size", "stride") else 0 for name in HANDLE_FIELDS}


def receiver(cls: Any) -> VllmReceiver:
    """Return a receiver that joined nothing."""
    config = SimpleNamespace(parallel_config=None, model_config=None)
    return cls(None, config, torch.device("cpu"), torch.nn.Module())


def test_an_engines_ranks_follow_those_of_the_engine_before() -> None:
    link = nccl([], tensor_parallel=4)(torch.empty(0))
    invitations = link.invite(3)
    assert [message["rank_offset"] for message in invitations] == [1, 5, 9]
    assert {message["world_size"] for message in invitations} == {13}  # the learner's rank 0 and 3 x 4
    assert first_rank(0, 8) == 1  # an engine of any size begins behind the learner
    for message in invitations:
        assert receiver(NcclReceiver).parse_init_info(message).world_size == 13


def test_every_worker_gets_every_parameter_from_one_broadcast_per_bucket() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    report = publication.publish("a", "b", "c")
    [group], [recipients] = groups, publication.all_recipients
    updates = recipients.messages("update_weights")
    assert [len(update) for update in updates] == [3, 3, 3]
    assert [update[0]["names"] for update in updates] == [["embed.weight"], ["norm.weight", "proj.weight"], ["scale"]]
    assert [payload.numel() for payload in group.broadcasts] == [48, 22, 2]
    assert_all_arrived(received([update[2] for update in updates], group.broadcasts))
    assert report.num_bytes == 72
    assert [verb for verb, _ in recipients.calls] == [
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
    assert publication.all_recipients == []


def test_a_bucket_is_one_message_by_the_rule_of_vllms_receiver() -> None:
    specs = FakeStudent().manifest("bfloat16")
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
    for bucket in plan_buckets(FakeStudent().manifest(dtype), BUCKET_BYTES):
        starts = [total_bytes(bucket[:position]) for position in range(len(bucket))]
        assert all(start % width == 0 for start in starts)


def test_vllm_takes_the_messages_of_both_links() -> None:
    bucket = FakeStudent().manifest("bfloat16")[1:3]
    broadcast = receiver(NcclReceiver).parse_update_info(nccl([])(torch.empty(0)).update_message(bucket))
    assert (broadcast.names, broadcast.dtype_names) == (["norm.weight", "proj.weight"], ["bfloat16", "bfloat16"])
    assert broadcast.shapes == [[3], [2, 4]]
    link = in_place({"GPU-0": PLAIN_HANDLE})
    shared = receiver(IpcReceiver).parse_update_info(link.update_message(bucket))
    assert shared.tensor_sizes == [6, 16]
    assert shared.ipc_handles == {"GPU-0": rebuild_arguments(PLAIN_HANDLE)}
    assert receiver(IpcReceiver).parse_init_info(link.invite(1)[0])


def test_the_same_workers_keep_their_group_and_others_get_another_at_another_port() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish("a", "b")
    publication.publish("a", "b", version=2)
    assert len(groups) == 1
    publication.publish("a", version=3)
    assert [group.is_destroyed for group in groups] == [True, False]
    ports = [recipients.messages("init_weight_transfer") for recipients in publication.all_recipients]
    assert [[invitation[0]["master_port"] for invitation in found] for found in ports] == [[5000], [], [5001]]


class BlockedGroup(FakeGroup):
    """Does not come back when it is left, as NCCL does not after a death."""

    def destroy(self) -> None:
        raise AssertionError("this would wait")


def test_a_newcomer_comes_by_the_object_store_and_the_group_goes_on() -> None:
    groups: list[FakeGroup] = []

    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        groups.append(BlockedGroup() if not groups else FakeGroup())
        return groups[-1]

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 1, 48, join)
    publication = Publication(lambda buffer: link)
    publication.publish("a", "b")
    publication.publish("c")  # as `bring_weights` does, in the middle of a step
    publication.publish("d")  # another one, before anything else is published
    assert len(groups) == 1
    assert [(new.workers, new.policy_version, new.is_finished) for new in publication.newcomers] == [
        (["c"], 1, True),
        (["d"], 1, True),
    ]
    for new in publication.newcomers:
        messages = [describe(bucket) for bucket, _ in new.sent]
        assert_all_arrived(received(messages, [values for _, values in new.sent]))
    assert [recipients.calls for recipients in publication.all_recipients[1:]] == [
        [("start_weight_update", {}), ("finish_weight_update", {})]
    ] * 2  # nobody else pauses
    publication.publish("a", "b", version=2)  # they died meanwhile
    assert len(groups) == 1
    assert publication.ends == []


def test_newcomers_join_the_group_with_the_publication_after_their_first() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish("a", "b")
    publication.publish("c")
    publication.publish("d")
    publication.publish("a", "b", "c", "d", version=2)
    assert [group.is_destroyed for group in groups] == [True, False]  # once for both
    [invitation] = publication.all_recipients[-1].messages("init_weight_transfer")
    assert {message["world_size"] for message in invitation.values()} == {5}
    assert len(publication.newcomers) == 2


def test_one_that_is_new_in_a_publication_takes_part_in_no_handshake() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups), crashing={"c": ("init_weight_transfer", 1)})
    publication.publish("a", "b")
    publication.publish("a", "b", "c", version=2)
    assert len(groups) == 1
    assert [new.workers for new in publication.newcomers] == [["c"]]
    assert publication.ends == []


def test_one_that_comes_to_a_shared_gpu_reads_the_buffer_as_the_others_do() -> None:
    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}))
    publication.publish("a")
    publication.publish("b")
    assert publication.newcomers == []
    assert publication.all_recipients[1].messages("finish_weight_update") == [{0: 1}]


def test_a_worker_that_dies_before_the_broadcast_is_left_out_of_the_group() -> None:
    publication = Publication(nccl([]), crashing={"b": ("start_weight_update", 1)})
    publication.publish("a", "b", "c")
    [invitation] = publication.all_recipients[0].messages("init_weight_transfer")
    assert {position: message["rank_offset"] for position, message in invitation.items()} == {0: 1, 2: 2}
    assert {message["world_size"] for message in invitation.values()} == {3}
    assert publication.ends == []


@pytest.mark.parametrize("bucket", [1, 2, 3])
def test_after_a_death_in_a_broadcast_the_others_get_everything_again_without_the_dead(bucket: int) -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups), crashing={"b": ("update_weights", bucket)})
    report = publication.publish("a", "b", "c")
    assert [group.is_destroyed for group in groups] == [True, False]
    broken, anew = publication.all_recipients
    assert len(broken.messages("update_weights")) == bucket
    assert list(anew.workers.values()) == ["a", "c"]
    [invitation] = anew.messages("init_weight_transfer")
    assert {message["world_size"] for message in invitation.values()} == {3}
    updates = anew.messages("update_weights")
    assert_all_arrived(received([update[1] for update in updates], groups[1].broadcasts))
    assert not broken.messages("finish_weight_update")
    assert anew.messages("finish_weight_update") == [{0: 1, 1: 1}]
    assert publication.ends == []
    assert report.num_bytes == 72
    publication.publish("a", "c", version=2)
    assert len(groups) == 2


def test_a_newcomer_gets_its_weights_once_though_the_group_breaks_and_joins_the_next() -> None:
    groups: list[FakeGroup] = []
    crashing = {"b": ("update_weights", 9)}
    publication = Publication(nccl(groups), crashing=crashing)
    publication.publish("a", "b")
    publication.all_recipients.clear()
    crashing["b"] = ("update_weights", 2)
    publication.publish("a", "b", "new", version=2)
    [newcomers] = publication.newcomers
    assert_all_arrived(received([describe(bucket) for bucket, _ in newcomers.sent], [v for _, v in newcomers.sent]))
    publication.publish("a", "new", version=3)
    assert len(publication.newcomers) == 1
    assert [sorted(r.workers.values()) for r in publication.all_recipients] == [["a"], ["a"], ["a", "new"]]


def test_all_ranks_of_the_learner_gather_everything_again_when_rank_0_does() -> None:
    others = iter([True, False])
    publication = Publication(nccl([], is_sender=False), agree=lambda value: [next(others), value])
    publication.engine.rank = 1
    publication.publish("a")
    assert publication.engine.gathered == 2 * [["embed.weight"], ["norm.weight", "proj.weight"], ["scale"]]


class BlockedGpu(FakeGroup):
    """Waits in its first broadcast for ranks that never come, as NCCL does, until the group is left or a test over."""

    def __init__(self, is_over: Event, is_freed_by_abort: bool = True) -> None:
        super().__init__()
        self._is_over, self._is_freed_by_abort = is_over, is_freed_by_abort

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        self._is_over.wait()

    def destroy(self) -> None:
        super().destroy()
        if self._is_freed_by_abort:
            self._is_over.set()


@pytest.fixture
def is_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Let threads that wait for ever go when a test ends."""
    monkeypatch.setattr(gpu_update, "CHECK_SECONDS", 0.05)
    event = Event()
    yield event
    event.set()


def stuck_link(is_over: Event, in_opening: bool, is_freed_by_abort: bool = False) -> Callable[[Tensor], NcclLink]:
    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        while in_opening and not is_over.wait(0.01):
            if is_given_up():
                raise WeightSyncError("the group did not form")
        return BlockedGpu(is_over, is_freed_by_abort) if meeting.world_size == 3 else FakeGroup()

    return lambda buffer: NcclLink(True, lambda: ("10.0.0.1", 5000), 1, buffer.numel(), join)


@pytest.mark.parametrize(
    ("verb", "in_opening"), [("init_weight_transfer", True), ("update_weights", False)], ids=["opening", "broadcast"]
)
def test_a_worker_that_fails_while_nccl_waits_for_it_is_heard(is_over: Event, verb: str, in_opening: bool) -> None:
    class Failing(FakeRecipients):
        def poll(self, references: Mapping[int, Any]) -> None:
            if self.calls[-1][0] == verb:
                raise WeightSyncError("no memory is left on the GPU")

    publication = Publication(stuck_link(is_over, in_opening), recipients=Failing)
    with pytest.raises(WeightSyncError, match="no memory is left"):
        publication.publish("a", "b")


def test_a_death_while_nccl_waits_in_a_broadcast_frees_the_learners_gpu(is_over: Event) -> None:
    link = stuck_link(is_over, in_opening=False, is_freed_by_abort=True)
    publication = Publication(link, crashing={"b": ("update_weights", 1)})
    publication.publish("a", "b")
    assert publication.all_recipients[-1].messages("finish_weight_update") == [{0: 1}]
    assert publication.ends == []


def test_where_nccl_does_not_let_go_of_the_gpu_the_learners_rank_ends(
    is_over: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(gpu_update, "FREE_SECONDS", 0.1)
    crashing = {"b": ("update_weights", 1)}
    publication = Publication(stuck_link(is_over, in_opening=False), crashing=crashing, end=end)
    with pytest.raises(SystemExit):
        publication.publish("a", "b")


def test_a_worker_that_lives_and_is_not_freed_ends_the_learners_rank() -> None:
    class Held(FakeRecipients):
        """Has a worker whose GPU waits for the dead one, whatever its process does."""

        def answers(self, references: Mapping[int, Any], what_for: str, **hooks: Any) -> dict[int, Any]:
            if any(references.values()) and what_for.startswith("receive"):
                assert hooks["on_death"]() == gpu_update.FREE_SECONDS
                raise ActorError("waited 60 s for rollout worker 0")
            return super().answers(references, what_for, **hooks)

    def end(code: int) -> None:
        raise SystemExit(code)

    publication = Publication(nccl([]), crashing={"b": ("update_weights", 2)}, recipients=Held, end=end)
    with pytest.raises(SystemExit):
        publication.publish("a", "b")


def test_a_broadcast_that_never_ends_though_nobody_died_ends_the_run_with_a_sentence(is_over: Event) -> None:
    publication = Publication(stuck_link(is_over, in_opening=False))
    with pytest.raises(WeightSyncError, match=r"did not reach all rollout workers within 0.5 s.*NCCL_SOCKET_IFNAME"):
        publication.publish("a", "b")


class FailingGroup(FakeGroup):
    """Fails in its second broadcast, as NCCL does where it hears of a death before Ray does."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        super().broadcast(tensor, src, stream)
        if len(self.broadcasts) == 2:
            raise RuntimeError("NCCL error: remote process exited")


def failing_link(buffer: Tensor) -> NcclLink:
    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        return FailingGroup() if meeting.world_size == 3 else FakeGroup()

    return NcclLink(True, lambda: ("10.0.0.1", 5000), 1, 48, join)


def test_what_nccl_fails_with_at_a_death_is_the_death() -> None:
    publication = Publication(failing_link, crashing={"b": ("update_weights", 2)})
    publication.publish("a", "b")
    assert publication.all_recipients[-1].messages("finish_weight_update") == [{0: 1}]


def test_what_nccl_fails_with_while_all_live_reaches_the_user() -> None:
    with pytest.raises(WeightSyncError, match=r"NCCL failed while weights were sent: .*remote process exited"):
        Publication(failing_link).publish("a", "b")


def test_after_a_death_while_the_group_forms_the_others_form_another() -> None:
    groups: list[FakeGroup] = []

    def join(meeting: Meeting, is_given_up: Callable[[], bool]) -> FakeGroup:
        while meeting.world_size == 3:  # as long as the dead one is waited for
            if is_given_up():
                raise WeightSyncError("the group did not form")
            time.sleep(0.01)
        groups.append(FakeGroup())
        return groups[-1]

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 1, 48, join)
    publication = Publication(lambda buffer: link, crashing={"b": ("init_weight_transfer", 1)})
    publication.publish("a", "b")
    [recipients] = publication.all_recipients
    assert [sorted(message) for message in recipients.messages("init_weight_transfer")] == [[0, 1], [0]]
    assert [sorted(message) for message in recipients.messages("finish_weight_update")] == [[0]]
    assert publication.ends == []
    publication.publish("a", version=2)
    assert len(groups) == 1


def test_a_death_beside_a_shared_buffer_ends_nothing() -> None:
    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}), crashing={"b": ("update_weights", 2)})
    publication.publish("a", "b")
    assert publication.ends == []
    finished = publication.all_recipients[0].messages("finish_weight_update")
    assert finished == [{0: 1}]


def test_without_workers_nothing_is_connected_or_sent() -> None:
    groups: list[FakeGroup] = []
    publication = Publication(nccl(groups))
    publication.publish()
    assert groups == []


def test_a_communicator_without_nccl_is_refused() -> None:
    class Disabled(FakeGroup):
        disabled = True

    link = NcclLink(True, lambda: ("10.0.0.1", 5000), 1, BUCKET_BYTES, lambda *_: Disabled())
    link.invite(1)
    with pytest.raises(WeightSyncError, match="no NCCL library"):
        link.open()


def test_a_shared_buffer_is_read_before_the_next_bucket_overwrites_it() -> None:
    read: list[tuple[dict[str, Any], Tensor]] = []

    class Reader(FakeRecipients):
        """Reads the buffer when its answer is awaited, as late as can be."""

        def answers(self, references: Mapping[int, Any], what_for: str, **hooks: Any) -> dict[int, Any]:
            if references and what_for.startswith("receive"):
                message = self.messages("update_weights")[-1][0]
                [buffer] = message["ipc_handles"].values()
                read.append((message, buffer[: sum(message["tensor_sizes"])].clone()))
            return super().answers(references, what_for, **hooks)

    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}), recipients=Reader)
    publication.publish("a")
    assert_all_arrived(received([message for message, _ in read], [payload for _, payload in read]))


@pytest.mark.parametrize("engines_sleep", [False, True])
def test_the_learners_cache_is_emptied_only_for_engines_that_take_memory_again(
    monkeypatch: pytest.MonkeyPatch, engines_sleep: bool
) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    publication = Publication(lambda buffer: in_place({"GPU-0": buffer}), engines_sleep=engines_sleep)
    for version in (1, 2):
        publication.publish("a", version=version)
    assert len(emptied) == 2 * engines_sleep


def test_engines_that_take_memory_again_are_a_generator_that_sleeps_and_teachers_of_a_slot() -> None:
    assert not some_sleep(make_config("ray.share_gpu=true"))
    assert some_sleep(make_config("ray.share_gpu=true", "rollout.engine.sleep=true"))
    slot = [f"teachers.{name}={{model='t',slot='s'}}" for name in ("main", "code")]
    assert some_sleep(make_config(*slot))
    assert not some_sleep(make_config(slot[0]))


def test_every_engine_finds_the_buffer_of_its_own_gpu() -> None:
    gathered = [{"GPU-0": "first"}, {"GPU-1": "second"}]
    link = IpcLink(torch.empty(0), "GPU-1", lambda value: gathered, lambda: None, lambda buffer: "second")
    assert link.update_message(())["ipc_handles"] == {"GPU-0": "first", "GPU-1": "second"}


def test_a_buffer_outside_a_gpu_is_not_shared() -> None:
    with pytest.raises(WeightSyncError, match="the learner has none"):
        ipc_link(torch.empty(1, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_that_others_cannot_open_are_refused_before_anything_is_shared(name: str) -> None:
    with pytest.raises(WeightSyncError, match=f'{name} = "max_split_size_mb:64, expandable_segments:True"'):
        refuse_expandable_segments({name: "max_split_size_mb:64, expandable_segments:True"})
    refuse_expandable_segments({name: "expandable_segments:False,max_split_size_mb:64"})
    refuse_expandable_segments({})


def test_what_an_older_vllm_does_not_know_is_dropped() -> None:
    message = nccl([])(torch.empty(0)).update_message(()) | {"of_a_later_release": 1}
    parsed = receiver(NcclReceiver).parse_update_info(message)
    assert {field.name for field in fields(parsed)} <= {field.name for field in fields(NCCLWeightTransferUpdateInfo)}


def test_a_tied_head_travels_once() -> None:
    tied = Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=True))
    untied = Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=False))
    names, more = ([spec.name for spec in Student(model).manifest("bfloat16")] for model in (tied, untied))
    assert "lm_head.weight" not in names
    assert more == [*names, "lm_head.weight"]
