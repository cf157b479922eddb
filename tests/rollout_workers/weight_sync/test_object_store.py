"""What the receiver notices without an engine."""

import hashlib
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from rollout_workers.vllm_engine import common_checksum
from rollout_workers.weight_sync.loading import missing_parameters, tied_layers
from rollout_workers.weight_sync.object_store import BucketMessage, map_memory
from rollout_workers.weight_sync.shared_memory import mappable, region_in_store, shared_memory

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


def test_bytes_outlive_the_senders_descriptor() -> None:
    values = np.arange(6, dtype=np.float32)
    with shared_memory(values.tobytes()) as path:
        memory = map_memory(BucketMessage(["a", "b"], ["float32"] * 2, [[2, 2], [2]], "", path, num_bytes=12, offset=8))
    assert memory.view(np.float32).tolist() == [2.0, 3.0, 4.0]


READ = """
import hashlib, sys
from rollout_workers.weight_sync.object_store import BucketMessage, map_memory
for path, num_bytes, offset in zip(*[iter(sys.argv[1:])] * 3):
    message = BucketMessage([""], [""], [], "", path, int(num_bytes), int(offset))
    print(hashlib.md5(map_memory(message)).hexdigest())
"""


def read_in_another_process(*buffers: pa.Buffer) -> list[tuple[bool, str]]:
    """Return whether each buffer is mapped from the store itself, and what a child process reads there."""
    with ExitStack() as stack:
        regions = [stack.enter_context(mappable(buffer)) for buffer in buffers]
        arguments = [str(value) for region in regions for value in (region.path, region.num_bytes, region.offset)]
        read = subprocess.run([sys.executable, "-c", READ, *arguments], capture_output=True, text=True, check=True)
    in_place = [region_in_store(buffer) == region for buffer, region in zip(buffers, regions, strict=True)]
    return list(zip(in_place, read.stdout.split(), strict=True))


@pytest.mark.slow
def test_a_process_beside_an_actor_reads_the_object_store_in_place(ray_cluster: None) -> None:
    first, second = (np.random.default_rng(seed).integers(0, 256, 300_001, np.uint8) for seed in (0, 1))
    references = [ray.put(pa.py_buffer(array)) for array in (first, second)]
    found = ray.get(ray.remote(read_in_another_process).remote(*references))
    assert found == [(True, hashlib.md5(array).hexdigest()) for array in (first, second)]


def test_bytes_outside_the_object_store_are_copied_for_the_other_process() -> None:
    with mappable(pa.py_buffer(b"weights")) as region:
        assert (
            bytes(map_memory(BucketMessage([], [], [], "", region.path, region.num_bytes, region.offset))) == b"weights"
        )


def test_ranks_that_received_the_same_bytes_have_one_checksum() -> None:
    assert common_checksum([{"checksum": "ab", "fault": None}] * 2, 3) == "ab"
