"""Packing a bucket and comparing checksums."""

import numpy as np
import pytest
import torch

from cluster.checksum import checksum, new_digest
from cluster.contracts.errors import WeightSyncError
from cluster.contracts.weights import TensorSpec
from learner.weight_sender import check_received, pack


def test_parameters_stand_one_after_the_other_in_the_dtype_asked_for():
    bucket = (TensorSpec("a", (2, 2), "bfloat16"), TensorSpec("b", (3,), "bfloat16"))
    parameters = {"b": torch.tensor([5.0, 6.0, 7.0]), "a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    payload = pack(bucket, parameters)
    assert payload.size == 14
    values = torch.frombuffer(bytearray(payload), dtype=torch.bfloat16)
    assert values.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_float32_travels_unchanged():
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    payload = pack((TensorSpec("a", (5, 7), "float32"),), {"a": values})
    np.testing.assert_array_equal(np.frombuffer(payload, np.float32).reshape(5, 7), values.numpy())


def test_the_checksum_does_not_depend_on_how_the_bytes_are_cut():
    digest = new_digest()
    digest.update(b"ab")
    digest.update(b"c")
    assert checksum([b"a", b"bc"]) == checksum([b"abc"]) == digest.hexdigest()
    assert checksum([b"abd"]) != checksum([b"abc"])


def test_the_worker_with_other_bytes_is_named():
    with pytest.raises(WeightSyncError, match="rollout worker 1: policy version 4 was sent with checksum aa"):
        check_received(["aa", "bb"], "aa", policy_version=4)
    check_received(["aa", "aa"], "aa", policy_version=4)
