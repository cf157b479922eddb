"""Sends bytes that lie in several places of memory, so that they arrive as one buffer and are copied once."""

from collections.abc import Iterable, Sequence
from pickle import PickleBuffer
from typing import Any

import pyarrow as pa

# Ray's object store keeps the buffers that pickle passes out of band one after the other, each from a multiple of this
# on. Pieces that end at multiples of it therefore lie there without gaps.
ALIGNMENT = 64  # bytes
SMALLEST_PIECE = 1 << 16  # bytes; smaller ones are joined, for each piece costs Ray some microseconds at either end


class Pieces:
    """Holds buffers that other objects own; pickled and unpickled, it is one `pa.Buffer` of their bytes in order.

    Example:
        >>> import pickle
        >>> pickle.loads(pickle.dumps(Pieces([b"ab", b"c"]), protocol=5)).to_pybytes()
        b'abc'
    """

    def __init__(self, buffers: Iterable[Any]) -> None:
        self._pieces = _cut([memoryview(buffer).cast("B") for buffer in buffers])
        self.size = sum(map(len, self._pieces))  # bytes

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, tuple(map(PickleBuffer, self._pieces))

    def joined(self) -> pa.Buffer:
        """Copy the bytes into one buffer."""
        return pa.py_buffer(b"".join(self._pieces))


def _cut(buffers: Sequence[memoryview]) -> list[memoryview]:
    """Join what is small, and cut what is large at multiples of ALIGNMENT of the whole."""
    pieces: list[memoryview] = []
    joined = bytearray()
    for buffer in buffers:
        start = -len(joined) % ALIGNMENT
        num_bytes = (len(buffer) - start) // ALIGNMENT * ALIGNMENT
        if num_bytes < SMALLEST_PIECE:
            joined += buffer
            continue
        joined += buffer[:start]
        pieces += [memoryview(joined), buffer[start : start + num_bytes]]
        joined = bytearray(buffer[start + num_bytes :])
    return [piece for piece in [*pieces, memoryview(joined)] if len(piece)]


def _arrive(*pieces: Any) -> pa.Buffer:
    """Return the pieces as one buffer: where they lie, if they lie there without gaps; else a copy."""
    buffers = [pa.py_buffer(piece) for piece in pieces]
    ends = [buffer.address + buffer.size for buffer in buffers]
    if buffers and all(end == after.address for end, after in zip(ends, buffers[1:], strict=False)):
        return pa.foreign_buffer(buffers[0].address, sum(buffer.size for buffer in buffers), base=buffers)
    return pa.py_buffer(b"".join(pieces))
