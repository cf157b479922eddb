"""TensorBoard's event files, written by hand: the format is four messages and a checksum.

A file is a sequence of records: length, masked CRC-32C of the length, an `Event` message, its masked CRC-32C
(tensorflow/core/lib/io/record_writer.h). Messages are protocol buffers (tensorflow/core/util/event.proto and
framework/summary.proto), of which five fields are used here. TensorBoard's own package brings a web server, gRPC and
Abseil for the same bytes.
"""

import math
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from cluster.monitoring.observers import Ending, StepSample

_CASTAGNOLI = 0x82F63B78  # reversed polynomial
_MASK_DELTA = 0xA282EAD8
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_SESSION_START = 1
NUM_BUCKETS = 30  # of a histogram


class EventFile:
    """The figures of a run for TensorBoard; each start of the run adds a file to the folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Begin a file; what earlier files say of steps after `first_step` is shown no longer."""
        folder.mkdir(mode=0o700, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._write(_field(3, b"brain.Event:2"), step=0)
        self._write(_field(7, _varint_field(1, _SESSION_START)), step=first_step + 1)

    def on_step(self, seen: StepSample) -> None:
        """Write one event with all figures and the lengths of the completions."""
        values = b"".join(_field(1, scalar(tag, value)) for tag, value in _finite(seen.record).items())
        if seen.completion_lengths:
            values += _field(1, histogram("rollout/completion_lengths", seen.completion_lengths))
        self._write(_field(5, values), seen.step)
        self._file.flush()

    def close(self, ending: Ending) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, what: bytes, step: int) -> None:
        event = _key(1, _FIXED64) + struct.pack("<d", time.time()) + _varint_field(2, step) + what
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc(length) + event + _masked_crc(event))


def scalar(tag: str, value: float) -> bytes:
    """Return a `Summary.Value` of one number."""
    return _field(1, tag.encode()) + _key(2, _FIXED32) + struct.pack("<f", value)


def histogram(tag: str, values: Sequence[float]) -> bytes:
    """Return a `Summary.Value` of a distribution, in buckets of equal width."""
    low, high = min(values), max(values)
    width = (high - low) / NUM_BUCKETS or 1.0
    limits = [low + width * (index + 1) for index in range(NUM_BUCKETS)]
    counts = [0.0] * NUM_BUCKETS
    for value in values:
        counts[min(NUM_BUCKETS - 1, max(0, math.ceil((value - low) / width) - 1))] += 1
    squares = sum(value * value for value in values)
    numbers = (low, high, len(values), sum(values), squares)
    message = b"".join(_key(index, _FIXED64) + struct.pack("<d", number) for index, number in enumerate(numbers, 1))
    for index, packed in ((6, limits), (7, counts)):
        message += _field(index, struct.pack(f"<{NUM_BUCKETS}d", *packed))
    return _field(1, tag.encode()) + _field(5, message)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of some bytes.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (_CASTAGNOLI if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


def _masked_crc(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF)


def _finite(record: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if math.isfinite(value) and name != "step"}


def _field(number: int, content: bytes) -> bytes:
    return _key(number, _BYTES) + _varint(len(content)) + content


def _varint_field(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _varint(value)


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])
