"""Packing a bucket, and comparing checksums."""

import numpy as np
import pytest
import torch

from cluster.contracts.errors import WeightSyncError
from cluster.weight_sync.manifest import TensorSpec, checksum, new_digest
from learner.weight_sync.object_store import check_received, pack, view


def memory(num_bytes: int) -> np.ndarray:
    return np.full(num_bytes, 255, np.uint8)


def test_parameters_stand_one_after_the_other_in_the_dtype_asked_for():
    bucket = (TensorSpec("a", (2, 2), "bfloat16"), TensorSpec("b", (3,), "bfloat16"))
    parameters = {"b": torch.tensor([5.0, 6.0, 7.0]), "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    packed = pack(bucket, parameters, memory(20))  # of a larger bucket before
    assert packed.size == 14
    assert torch.from_numpy(packed).view(torch.bfloat16).tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_parameters_that_can_travel_as_they_are_are_not_copied():
    half = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    parameters = {"same": half, "other dtype": torch.tensor([5.0]), "turned": half.T, "number": half[0, 0]}
    bucket = [TensorSpec(name, tuple(values.shape), "bfloat16") for name, values in parameters.items()]
    kept = memory(20)
    pieces = view(bucket, parameters, kept)
    values = [torch.from_numpy(np.copy(piece)).view(torch.bfloat16).tolist() for piece in pieces]
    assert values == [[1, 2, 3, 4], [5], [1, 3, 2, 4], [1]]
    in_place = [
        piece.ctypes.data == parameters[name].data_ptr() for name, piece in zip(parameters, pieces, strict=True)
    ]
    assert in_place == [True, False, False, True]
    assert kept[:8].tolist() == [255] * 8  # nothing was written for those


def test_float32_travels_unchanged():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    packed = pack((TensorSpec("a", (5, 7), "float32"),), {"a": values}, memory(140))
    np.testing.assert_array_equal(np.frombuffer(packed, np.float32).reshape(5, 7), values.numpy())


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
