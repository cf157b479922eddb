"""Event files against TensorBoard's format; the protobuf bytes were worked out by hand from its .proto files."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

from cluster.monitoring.observers import StepSample
from cluster.monitoring.tensorboard import EventFile, crc32c, histogram, scalar

WALL_TIME_BYTES = 9  # key and double, first in every event


def events(folder: Path) -> Iterator[bytes]:
    """Yield the events of the only file, without their times, checking both checksums of each."""
    [path] = folder.iterdir()
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = data[12 : 12 + length]
        assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
        assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(event),)
        yield event[WALL_TIME_BYTES:]
        data = data[16 + length :]


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % (1 << 32)


def test_the_checksum_is_crc_32c() -> None:
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


def test_a_number_is_a_tag_and_a_float() -> None:
    assert scalar("kl", 1.0) == b"\x0a\x02kl" + b"\x15\x00\x00\x80\x3f"


def test_a_step_is_one_event_with_its_finite_figures(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "tensorboard", first_step=0)
    file.on_step(StepSample({"step": 300, "kl": 1.0, "bad": math.nan}, [], [], []))
    file.close("ended")
    version, start, step = events(tmp_path / "tensorboard")
    assert version == b"\x10\x00" + b"\x1a\x0dbrain.Event:2"
    assert start == b"\x10\x01" + b"\x3a\x02\x08\x01"  # a session starts with step 1
    value = scalar("kl", 1.0)
    summary = b"\x0a" + bytes([len(value)]) + value
    assert step == b"\x10\xac\x02" + b"\x2a" + bytes([len(summary)]) + summary  # 300 in two bytes


def test_a_resumed_run_says_which_steps_it_does_again(tmp_path: Path) -> None:
    EventFile(tmp_path / "tensorboard", first_step=4).close("failed")
    _, start = events(tmp_path / "tensorboard")
    assert start == b"\x10\x05" + b"\x3a\x02\x08\x01"


def test_a_distribution_counts_every_value_once_in_its_bucket() -> None:
    message = histogram("l", [0, 1, 15, 30])
    counts = struct.unpack("<30d", message[-240:])
    assert counts[0] == 2  # 0 and 1: the first bucket ends with 1
    assert (counts[14], counts[29], sum(counts)) == (1, 1, 4)
    assert struct.unpack("<d", message[-240 - 3 - 8 : -240 - 3]) == (30.0,)  # the last limit


def test_values_that_are_all_alike_are_a_distribution_too() -> None:
    assert sum(struct.unpack("<30d", histogram("l", [7, 7, 7])[-240:])) == 3
