"""What the receiver notices without an engine."""

import hashlib
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pytest
import ray

from cluster.vllm.weight_sync.object_store import BucketMessage, map_memory, reason_of
from cluster.vllm.weight_sync.shared_memory import mappable, region_in_store, shared_memory
from cluster.vllm.weight_sync.updates import common_checksum


def test_bytes_outlive_the_senders_descriptor() -> None:
    values = np.arange(6, dtype=np.float32)
    with shared_memory(values.tobytes()) as path:
        memory = map_memory(BucketMessage(["a", "b"], ["float32"] * 2, [[2, 2], [2]], "", path, num_bytes=12, offset=8))
    assert memory.view(np.float32).tolist() == [2.0, 3.0, 4.0]


READ = """
import hashlib, sys
from cluster.vllm.weight_sync.object_store import BucketMessage, map_memory, reason_of
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


def test_what_a_model_says_of_a_tensor_is_one_sentence_without_all_its_names() -> None:
    named = "There is no module or parameter named 'model.a' in Model. The available parameters belonging to model are"
    assert reason_of(ValueError(f"{named}: b, c")) == "There is no module or parameter named 'model.a' in Model"
    assert reason_of(AssertionError()) == "AssertionError"
