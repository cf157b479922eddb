"""What the receiver notices without an engine."""

import torch

from rollout_workers.vllm_engine import common_checksum, shared_memory
from rollout_workers.weight_receiver import Bucket, map_memory, missing_parameters, parameter_views, tied_layers

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def test_a_parameter_that_no_name_touched_is_missing() -> None:
    assert missing_parameters({"norm.weight", "embed.weight"}, {"embed.weight"}, {"embed.weight"}, {}) == [
        "norm.weight"
    ]


def test_one_absent_part_of_a_packed_parameter_is_missing() -> None:
    received = {"layers.0.q_proj.weight", "layers.0.v_proj.weight"}
    names = {"layers.0.qkv_proj.weight"}
    assert missing_parameters(names, names, received, PACKED) == ["layers.0.k_proj.weight"]


def test_a_packed_parameter_that_arrives_under_other_names_is_not_missing() -> None:
    names = {"layers.0.qkv_proj.weight"}
    assert missing_parameters(names, names, {"h.0.attn.c_attn.weight"}, PACKED) == []


def test_the_second_owner_of_a_parameter_is_tied() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False), torch.nn.Linear(2, 4))
    model[1].weight = model[0].weight
    assert tied_layers(model) == [model[1]]


def test_views_outlive_the_senders_descriptor() -> None:
    values = torch.arange(6, dtype=torch.float32)
    with shared_memory(values.numpy().tobytes()) as path:
        bucket = Bucket(["a", "b"], ["float32", "float32"], [[2, 2], [2]], "", path, 24)
        views = dict(parameter_views(map_memory(bucket), bucket))
    assert views["a"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert views["b"].tolist() == [4.0, 5.0]


def test_ranks_that_received_the_same_bytes_have_one_checksum() -> None:
    assert common_checksum([{"checksum": "ab", "fault": None}] * 2, 3) == "ab"
