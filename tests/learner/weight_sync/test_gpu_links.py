"""Weights go from GPU to GPU: the ranks, the messages, the bytes, and the order of things; no GPU is needed.

The receiving ends are vLLM's, which run on CUDA only. Their rules are taken from vLLM itself where it can be called
here: its dataclasses check the messages, `pack_tensors` cuts what is sent as its consumer does, and `unpack_tensor`
reads what arrives.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

from cluster.contracts.errors import WeightSyncError
from cluster.vllm.weight_sync.nccl_and_ipc import IpcReceiver, NcclReceiver, VllmReceiver
from cluster.weight_sync.ipc_handles import HANDLE_FIELDS, rebuild_arguments
from cluster.weight_sync.manifest import plan_buckets, total_bytes
from learner.model.student import Student
from learner.weight_sync.gpu_links import IpcLink, NcclLink, first_rank
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
