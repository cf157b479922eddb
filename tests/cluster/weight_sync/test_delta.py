"""Changes of a parameter, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.weight_sync.delta import ALIGNMENT, apply, encode, part_bytes


@st.composite
def changed_values(draw: st.DrawFn) -> tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]]:
    """Draw old and new values, of which a random part, none and all included, differ."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    size = draw(st.integers(0, 3000))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    old = random.integers(0, np.iinfo(dtype).max, size, dtype, endpoint=True)
    changes = random.random(size) < draw(st.sampled_from([0.0, 0.001, 0.01, 0.1, 0.3, 0.9, 1.0]))
    return old, np.where(changes, old ^ dtype(draw(st.integers(1, np.iinfo(dtype).max))), old)


@given(changed_values())
def test_old_values_and_changes_make_the_new_values_in_no_more_bytes_than_these(
    drawn: tuple[NDArray[np.unsignedinteger], NDArray[np.unsignedinteger]],
) -> None:
    old, new = drawn
    delta = encode(old, new)
    part = delta.to_bytes()
    assert part.size == part_bytes(delta.encoding, len(delta.values), new.size, new.itemsize)
    assert part.size < new.nbytes + ALIGNMENT
    assert delta.num_changed == (old != new).sum()
    apply(old, delta.encoding, len(delta.values), part)
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
    delta = encode(old, new)
    assert delta.encoding == encoding
    assert delta.to_bytes().size == num_bytes


@pytest.mark.parametrize("distance", [255, 256, 510, 511, 65_535, 65_536, 131_071])
def test_a_distance_at_the_limit_of_its_width_arrives(distance: int) -> None:
    old = np.arange(200_000, dtype=np.uint32)
    new = old.copy()
    new[[distance, 2 * distance if 2 * distance < 200_000 else 0]] = 5_000_000
    delta = encode(old, new)
    apply(old, delta.encoding, len(delta.values), delta.to_bytes())
    np.testing.assert_array_equal(old, new)


def test_nan_and_negative_zero_travel_as_bits() -> None:
    old = np.array([0.0, 1.0, np.nan, 2.0] * 20, np.float32).view(np.uint32)
    new = np.array([-0.0, 1.0, np.nan, 2.0] + [0.0, 1.0, np.nan, 2.0] * 19, np.float32).view(np.uint32)
    delta = encode(old, new)
    assert delta.num_changed == 1
    apply(old, delta.encoding, len(delta.values), delta.to_bytes())
    np.testing.assert_array_equal(old, new)
