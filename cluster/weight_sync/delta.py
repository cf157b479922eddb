"""Which values of a parameter changed between two weight syncs, bit for bit, in the fewest bytes.

After an optimizer step with a small learning rate most bfloat16 values are what they were: an update below half the
distance to the next value is lost in rounding. Parameters are compared as unsigned integers of their width, so that
NaN and -0.0 travel like any other value.

Positions are written as distances from one to the next, in 8 or 16 bits, or as a bit per value. A distance that does
not fit is split by positions whose value did not change, so a decoder needs no special case.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]  # [values] uint16 or uint32: what the values look like in memory
Encoding = Literal["distances8", "distances16", "mask", "whole"]
DISTANCES: Mapping[str, type[np.unsignedinteger[Any]]] = {"distances8": np.uint8, "distances16": np.uint16}
BITS: Mapping[str, type[np.unsignedinteger[Any]]] = {
    "float32": np.uint32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
}
ALIGNMENT = 4  # bytes; of every part of a payload, so that its values can be read in place


@dataclass(frozen=True)
class Delta:
    """What turns the old values of one parameter into the new ones.

    Example:
        >>> old, new = np.array([1, 2, 3, 4] * 8, np.uint16), np.array([1, 2, 3, 9] + [1, 2, 3, 4] * 7, np.uint16)
        >>> delta = encode(old, new)
        >>> delta.encoding, delta.positions.tolist(), delta.values.tolist()
        ('distances8', [3], [9])
        >>> apply(old, delta.encoding, len(delta.values), delta.to_bytes())
        >>> old.tolist() == new.tolist()
        True
    """

    encoding: Encoding
    values: Bits
    positions: NDArray[Any]  # distances; or bits, eight to a byte; empty where all values come
    num_changed: int

    def to_bytes(self) -> NDArray[np.uint8]:
        """Return values and positions, filled up with zeros to a multiple of ALIGNMENT."""
        parts = [self.values.view(np.uint8), self.positions.view(np.uint8)]
        filling = -sum(part.size for part in parts) % ALIGNMENT
        return np.concatenate([*parts, np.zeros(filling, np.uint8)])


def encode(old: Bits, new: Bits) -> Delta:
    """Describe the new values by the old ones, or, where that takes no less bytes, by themselves."""
    changed = np.flatnonzero(old != new)
    nothing = np.empty(0, np.uint8)
    sizes: dict[Encoding, int] = {"whole": new.nbytes, "mask": -(-new.size // 8) + changed.size * new.itemsize}
    distances = np.empty(0, np.int64)
    if changed.size < new.size // 8:  # else a distance of 8 bits per value takes more than a bit per value
        distances = np.diff(changed, prepend=0)
        for encoding in ("distances8", "distances16"):
            width = np.dtype(DISTANCES[encoding])
            num_values = int(_pieces(distances, np.iinfo(width).max).sum())
            sizes[encoding] = num_values * (width.itemsize + new.itemsize)
    encoding = min(sizes, key=lambda name: sizes[name])
    if encoding == "whole":
        return Delta(encoding, new, nothing, changed.size)
    if encoding == "mask":
        return Delta(encoding, new[changed], np.packbits(old != new), changed.size)
    positions = _split(distances, DISTANCES[encoding])
    return Delta(encoding, new[np.cumsum(positions, dtype=np.int64)], positions, changed.size)


def apply(old: Bits, encoding: str, num_values: int, part: NDArray[np.uint8]) -> None:
    """Turn old values into new ones in place.

    Args:
        old: the values to change.
        encoding: an Encoding.
        num_values: how many values stand in the part.
        part: as `to_bytes` makes it.
    """
    end = num_values * old.itemsize
    values = part[:end].view(old.dtype)
    if encoding == "whole":
        old[:] = values
    elif encoding == "mask":
        old[np.unpackbits(part[end:], count=old.size).view(np.bool_)] = values
    else:
        width = np.dtype(DISTANCES[encoding])
        distances = part[end : end + num_values * width.itemsize].view(width)
        old[np.cumsum(distances, dtype=np.int64)] = values


def part_bytes(encoding: str, num_values: int, size: int, itemsize: int) -> int:
    """Return the length of a part for a parameter of `size` values of `itemsize` bytes."""
    positions = {"whole": 0, "mask": -(-size // 8)}
    if encoding in DISTANCES:
        positions[encoding] = num_values * np.dtype(DISTANCES[encoding]).itemsize
    length = num_values * itemsize + positions[encoding]
    return length + -length % ALIGNMENT


def _pieces(distances: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Return into how many distances of at most `longest` each one has to be split."""
    pieces: NDArray[np.int64] = np.maximum(-(-distances // longest), 1)
    return pieces


def _split(distances: NDArray[np.int64], width: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    longest = int(np.iinfo(width).max)
    pieces = _pieces(distances, longest)
    split = np.full(pieces.sum(), longest, width)
    split[np.cumsum(pieces) - 1] = distances - (pieces - 1) * longest
    return split


Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class TensorPart:
    """One parameter in a bucket."""

    name: str
    dtype: str
    size: int  # values
    encoding: str
    num_values: int  # that stand in the bucket
    place: slice  # of its bytes in the bucket


@dataclass
class WeightCopy:
    """Whole parameters in host memory, as of one policy version; empty where only whole parameters come."""

    version: int | None = None  # None: no changes can be applied
    parameters: dict[str, Bytes] = field(default_factory=dict)

    def take(self, part: TensorPart, memory: Bytes) -> Bytes:
        """Bring a parameter up to date in place, and return it whole."""
        bits = BITS[part.dtype]
        if part.encoding == "whole" and part.name not in self.parameters:
            self.parameters[part.name] = np.empty(part.size * np.dtype(bits).itemsize, np.uint8)
        kept = self.parameters[part.name]
        apply(kept.view(bits), part.encoding, part.num_values, memory[part.place])
        return kept

    def forget(self) -> None:
        """Free the parameters."""
        self.version = None
        self.parameters.clear()


def parts(bucket: Any) -> Iterator[TensorPart]:
    """Yield the bucket's parameters: without encodings they stand whole, one after the other without gaps."""
    start = 0
    for position, (name, dtype, shape) in enumerate(zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True)):
        size, itemsize = prod(shape), np.dtype(BITS[dtype]).itemsize
        encoding, num_values, length = "whole", size, size * itemsize
        if bucket.encodings:
            encoding, num_values = bucket.encodings[position], bucket.num_values[position]
            length = part_bytes(encoding, num_values, size, itemsize)
        yield TensorPart(name, dtype, size, encoding, num_values, slice(start, start + length))
        start += length
