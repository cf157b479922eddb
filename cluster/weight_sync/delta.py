"""Sends which values of a parameter changed between two weight syncs, bit for bit, in the fewest bytes.

After an optimizer step with a small learning rate most bfloat16 values are what they were: an update below half the
distance to the next value is lost in rounding. Parameters are compared as unsigned integers of their width, so that
NaN and -0.0 travel like any other value.

Positions are written as distances from one to the next, in 8 or 16 bits, or as a bit per value. A distance that does
not fit is split by positions whose value did not change, so a decoder needs no special case.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cluster.weight_sync.manifest import Bucket, Bytes, TensorSpec, places
from cluster.weight_sync.transports import Encoded

Bits = NDArray[Any]  # [values] uint16 or uint32: what the values look like in memory
Encoding = Literal["distances8", "distances16", "mask", "whole"]
DISTANCES: Mapping[str, type[np.unsignedinteger[Any]]] = {"distances8": np.uint8, "distances16": np.uint16}
BITS: Mapping[str, type[np.unsignedinteger[Any]]] = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}
ALIGNMENT = 4  # bytes; of every tensor's part of what travels, so that its values can be read in place


@dataclass(frozen=True)
class Changes:
    """Holds what turns the old values of one parameter into the new ones.

    Example:
        >>> old, new = np.array([1, 2, 3, 4] * 8, np.uint16), np.array([1, 2, 3, 9] + [1, 2, 3, 4] * 7, np.uint16)
        >>> changes = encode(old, new)
        >>> changes.encoding, changes.positions.tolist(), changes.values.tolist()
        ('distances8', [3], [9])
        >>> apply(old, changes.encoding, len(changes.values), changes.to_bytes())
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


def encode(old: Bits, new: Bits) -> Changes:
    """Describe the new values by the old ones, or, where that takes no less bytes, by themselves."""
    changed = np.flatnonzero(old != new)
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
        return Changes(encoding, new, np.empty(0, np.uint8), changed.size)
    if encoding == "mask":
        return Changes(encoding, new[changed], np.packbits(old != new), changed.size)
    positions = _split(distances, DISTANCES[encoding])
    return Changes(encoding, new[np.cumsum(positions, dtype=np.int64)], positions, changed.size)


def apply(old: Bits, encoding: str, num_values: int, part: NDArray[np.uint8]) -> None:
    """Turn old values into new ones in place; `part`, as `to_bytes` makes it, holds `num_values` new ones."""
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


class DeltaPayload:
    """Sends the values that changed since the last update; each end keeps a copy of the weights in host memory."""

    is_incremental = True

    def __init__(self) -> None:
        self._kept: dict[str, Bytes] = {}  # as of the last update; on the receiving end after this one's decoding

    def encode(self, bucket: Bucket, values: Bytes, has_base: bool) -> Encoded:
        changes = []
        for tensor, place in places(bucket):
            kept, new, bits = self._kept_values(tensor), values[place], BITS[tensor.dtype]
            if has_base:
                changes.append(encode(kept.view(bits), new.view(bits)))
            kept[:] = new
        if not has_base:
            return Encoded(values)
        parts = [one.to_bytes() for one in changes]
        fields = {
            "encodings": [one.encoding for one in changes],
            "num_values": [len(one.values) for one in changes],
            "num_bytes": [len(part) for part in parts],
        }
        # Nothing cannot be mapped, so a bucket without changes has a few bytes.
        joined = np.concatenate(parts) if any(map(len, parts)) else np.zeros(ALIGNMENT, np.uint8)
        return Encoded(joined, fields, sum(one.num_changed for one in changes))

    def decode(self, bucket: Bucket, encoded: Encoded) -> Iterator[Bytes]:
        """Bring the kept tensors up to date in place, and yield them."""
        if not encoded.fields:
            for tensor, place in places(bucket):
                kept = self._kept_values(tensor)
                kept[:] = encoded.memory[place]
                yield kept
            return
        start = 0
        columns = [encoded.fields[name] for name in ("encodings", "num_values", "num_bytes")]
        for tensor, encoding, num_values, num_bytes in zip(bucket, *columns, strict=True):
            kept = self._kept[tensor.name]
            apply(kept.view(BITS[tensor.dtype]), encoding, num_values, encoded.memory[start : start + num_bytes])
            start += num_bytes
            yield kept

    def _kept_values(self, tensor: TensorSpec) -> Bytes:
        if tensor.name not in self._kept:
            self._kept[tensor.name] = np.empty(tensor.num_bytes, np.uint8)
        return self._kept[tensor.name]
