from cluster.weight_sync.manifest import TensorSpec, plan_buckets, total_bytes


def make_tensor(name: str, values: int) -> TensorSpec:
    return TensorSpec(name, (values,), "bfloat16")


def test_buckets_hold_every_tensor_once_in_order_and_within_their_size() -> None:
    tensors = [make_tensor(name, values) for name, values in zip("abcde", (3, 3, 3, 20, 1), strict=True)]
    buckets = list(plan_buckets(tensors, bucket_bytes=12))
    assert [[tensor.name for tensor in bucket] for bucket in buckets] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_manifest_counts_the_bytes_of_one_copy() -> None:
    tensors = (TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (5,), "bfloat16"))
    assert total_bytes(tensors) == 2 * 3 * 4 + 5 * 2
