"""Changes of a parameter, bit for bit."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.weight_sync.delta import ALIGNMENT, DeltaPayload, apply, encode
from cluster.weight_sync.manifest import Bytes, TensorSpec
from cluster.weight_sync.transports import Encoded


@st.composite
def changed_values(draw: st.DrawFn) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]:
    """Draw old and new values, of which a random part, none and all included, differ."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    size = draw(st.integers(0, 3000))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old = random.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    is_changed = random.random(size) < draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.9, 1.0]))
    return old, np.where(is_changed, old ^ dtype(draw(st.integers(1, np.iinfo(dtype).max))), old)


@given(changed_values())
def test_old_values_and_changes_make_the_new_values_in_no_more_bytes_than_these(
    drawn: tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]],
) -> None:
    old, new = drawn
    changes = encode(old, new)
    part = changes.to_bytes()
    assert part.size % ALIGNMENT == 0
    assert part.size < new.nbytes + ALIGNMENT
    assert changes.num_changed == (old != new).sum()
    apply(old, changes.encoding, len(changes.values), part)
    np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize(
    ("num_changed", "encoding", "num_bytes"),
    [
        (0, "distances8", 0),
        (1, "distances16", 4),  # one value and one distance of 50,000
        (1_000, "distances8", 3_000),  # 2 + 1 bytes each
        (20_000, "mask", 12_500 + 40_000),  # a bit for each of 100,000 values
        (99_999, "whole", 200_000),
    ],
)
def test_the_encoding_with_the_fewest_bytes_is_chosen(num_changed: int, encoding: str, num_bytes: int) -> None:
    old = np.zeros(100_000, np.uint16)
    new = old.copy()
    # From the middle for a single change, else evenly spread, the first and the last value included.
    new[np.linspace(0, 99_999, num_changed).astype(int) if num_changed != 1 else [50_000]] = 7
    changes = encode(old, new)
    assert changes.encoding == encoding
    assert changes.to_bytes().size == num_bytes


@pytest.mark.parametrize("distance", [255, 256, 510, 511, 65_535, 65_536, 131_071])
def test_a_distance_at_the_limit_of_its_width_arrives(distance: int) -> None:
    old = np.arange(200_000, dtype=np.uint32)
    new = old.copy()
    new[[distance, 2 * distance if 2 * distance < 200_000 else 0]] = 5_000_000
    changes = encode(old, new)
    apply(old, changes.encoding, len(changes.values), changes.to_bytes())
    np.testing.assert_array_equal(old, new)


def test_nan_and_negative_zero_travel_as_bits() -> None:
    old = np.array([0.0, 1.0, np.nan, 2.0] * 20, np.float32).view(np.uint32)
    new = np.array([-0.0, 1.0, np.nan, 2.0] + [0.0, 1.0, np.nan, 2.0] * 19, np.float32).view(np.uint32)
    changes = encode(old, new)
    assert changes.num_changed == 1
    apply(old, changes.encoding, len(changes.values), changes.to_bytes())
    np.testing.assert_array_equal(old, new)


def bytes_of(*values: NDArray[Any]) -> Bytes:
    return np.concatenate([array.view(np.uint8) for array in values])


def test_a_tensor_that_changed_everywhere_comes_whole_and_the_others_as_changes() -> None:
    bucket = [TensorSpec("a", (100,), "bfloat16"), TensorSpec("b", (3,), "bfloat16"), TensorSpec("c", (9,), "bfloat16")]
    payload = DeltaPayload()
    payload.encode(bucket, np.zeros(224, np.uint8), has_base=False)
    one_changed = np.zeros(100, np.uint16)
    one_changed[40] = 1
    encoded = payload.encode(bucket, bytes_of(one_changed, np.ones(3, np.uint16), np.zeros(9, np.uint16)), True)
    assert encoded.fields["encodings"] == ["distances8", "whole", "distances8"]
    assert (encoded.fields["num_values"], encoded.fields["num_bytes"]) == ([1, 3, 0], [4, 8, 0])
    assert encoded.num_changed == 4
    assert encoded.memory.size == 4 + 8  # 2 + 1 and 3 x 2 bytes, each filled up to a multiple of 4


def test_what_did_not_change_has_a_few_bytes_because_nothing_cannot_be_mapped() -> None:
    bucket, values, payload = [TensorSpec("a", (4,), "bfloat16")], np.ones(8, np.uint8), DeltaPayload()
    assert payload.encode(bucket, values, has_base=False).fields == {}
    encoded = payload.encode(bucket, values, has_base=True)
    assert (encoded.num_changed, encoded.memory.size, encoded.memory.any()) == (0, 4, False)


TENSORS = [TensorSpec("a", (30, 5), "bfloat16"), TensorSpec("b", (7,), "bfloat16"), TensorSpec("c", (400,), "float32")]


@given(
    st.lists(st.sampled_from([0.0, 0.01, 0.2, 1.0]), min_size=2, max_size=4),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
def test_after_any_updates_in_any_buckets_the_receiver_has_what_was_sent(
    fractions: list[float], border: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    buckets = [tensors for tensors in (TENSORS[:border], TENSORS[border:]) if tensors]
    sent = [random.integers(0, 256, sum(tensor.num_bytes for tensor in bucket), np.uint8) for bucket in buckets]
    learner, engine, late_engine = DeltaPayload(), DeltaPayload(), DeltaPayload()
    for update, fraction in enumerate([0.0, *fractions]):
        for position, bucket in enumerate(buckets):
            old = sent[position]
            sent[position] = np.where(random.random(old.size) < fraction, ~old, old)
            encoded = learner.encode(bucket, sent[position], has_base=update > 0)
            for receiver, message in ((engine, encoded), (late_engine, Encoded(sent[position]))):
                np.testing.assert_array_equal(np.concatenate(list(receiver.decode(bucket, message))), sent[position])
