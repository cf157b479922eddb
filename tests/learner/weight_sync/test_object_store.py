"""Packing a bucket, describing what changed in it, and comparing checksums."""

import numpy as np
import pytest
import torch

from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.manifest import TensorSpec, checksum, new_digest
from learner.weight_sync.object_store import check_received, compare, join, pack


def memory(num_bytes: int) -> np.ndarray:
    return np.full(num_bytes, 255, np.uint8)


def test_parameters_stand_one_after_the_other_in_the_dtype_asked_for():
    bucket = (TensorSpec("a", (2, 2), "bfloat16"), TensorSpec("b", (3,), "bfloat16"))
    parameters = {"b": torch.tensor([5.0, 6.0, 7.0]), "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    payload = pack(bucket, parameters, memory(20))  # of a larger bucket before
    assert payload.size == 14
    values = torch.from_numpy(payload).view(torch.bfloat16)
    assert values.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_float32_travels_unchanged():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    payload = pack((TensorSpec("a", (5, 7), "float32"),), {"a": values}, memory(140))
    np.testing.assert_array_equal(np.frombuffer(payload, np.float32).reshape(5, 7), values.numpy())


def test_the_checksum_does_not_depend_on_how_the_bytes_are_cut():
    digest = new_digest()
    digest.update(b"ab")
    digest.update(b"c")
    assert checksum([b"a", b"bc"]) == checksum([b"abc"]) == digest.hexdigest()
    assert checksum([b"abd"]) != checksum([b"abc"])


def test_the_worker_with_other_bytes_is_named():
    with pytest.raises(WeightSyncError, match="rollout worker 1: policy version 4 was sent with checksum aa"):
        check_received({0: "aa", 1: "bb"}, "aa", policy_version=4)
    check_received({0: "aa", 2: "aa"}, "aa", policy_version=4)


def test_a_delta_has_a_part_per_parameter_and_one_that_changed_everywhere_comes_whole() -> None:
    bucket = (TensorSpec("a", (100,), "bfloat16"), TensorSpec("b", (3,), "bfloat16"), TensorSpec("c", (9,), "bfloat16"))
    old = {"a": torch.zeros(100), "b": torch.zeros(3), "c": torch.zeros(9)}
    new = {"a": torch.zeros(100), "b": torch.ones(3), "c": torch.zeros(9)}
    new["a"][40] = 1.0
    delta = compare(bucket, pack(bucket, old, memory(224)), pack(bucket, new, memory(224)))
    assert [(part.encoding, part.num_changed) for part in delta] == [("distances8", 1), ("whole", 3), ("distances8", 0)]
    assert join(delta).size == 4 + 8  # 2 + 1 and 3 x 2 bytes, each filled up to a multiple of 4


def test_a_change_that_rounding_loses_does_not_travel() -> None:
    bucket = (TensorSpec("a", (4,), "bfloat16"),)
    old, new = ({"a": torch.full((4,), value)} for value in (1.0, 1.0 + 1e-3))  # bfloat16's next above 1 is 1.0078
    delta = compare(bucket, pack(bucket, old, memory(8)), pack(bucket, new, memory(8)))
    assert delta[0].num_changed == 0
    assert not join(delta).any()
    assert join(delta).size == 4  # a mapping cannot be empty
