"""Bytes that are no whole trajectory batch of this release end in one sentence, and never end the process."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.errors import TrajectoryError
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import from_wire, to_wire
from tests.malformed.refusal import SECONDS_PER_CASE, assert_refused, assert_sentence
from tests.malformed.wire_cases import BATCH, CUTS, WIRE, WRONG_BATCHES, WRONG_BYTES

pytestmark = pytest.mark.timeout(4 * SECONDS_PER_CASE)
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_a_batch_that_breaks_the_contract_is_one_sentence(case: str) -> None:
    batch, says = WRONG_BATCHES[case]
    assert_refused(lambda: from_wire(to_wire(batch)), TrajectoryError, says)


@pytest.mark.parametrize("case", WRONG_BYTES)
def test_bytes_of_something_else_are_one_sentence(case: str) -> None:
    wire, says = WRONG_BYTES[case]
    assert_refused(lambda: from_wire(wire), TrajectoryError, says)


@pytest.mark.parametrize("length", CUTS)
def test_a_stream_cut_anywhere_is_one_sentence(length: int) -> None:
    assert_refused(lambda: from_wire(WIRE[:length]), TrajectoryError, "wire: not an Arrow trajectory batch")


def test_the_whole_stream_is_read() -> None:
    assert from_wire(WIRE, "scored").equals(BATCH)


@settings(max_examples=300, deadline=None)
@given(length=st.integers(0, len(WIRE) - 9))  # the last 8 bytes only say that the stream ends
def test_no_part_of_a_stream_passes_for_the_whole(length: int) -> None:
    assert_refused(lambda: from_wire(WIRE[:length]), TrajectoryError, "wire: not an Arrow trajectory batch")


def read_damaged(wire: bytes) -> None:
    """Read bytes and, where they are accepted, every value of every column, as learners and teachers do."""
    try:
        batch = from_wire(wire)
    except TrajectoryError as error:
        assert_sentence(str(error), "")
        return
    for field in batch.schema:
        if pa.types.is_list(field.type):
            column = ragged(batch, field.name)
            assert sum(len(column[row]) for row in range(len(column))) == len(column.values)
    assert batch.num_rows == len(batch.to_pylist())


def flip_every_byte(first: int, step: int) -> int:
    """Read the bytes with one bit of each `step`-th byte flipped, a different bit from byte to byte."""
    for offset in range(first, len(WIRE), step):
        damaged = bytearray(WIRE)
        damaged[offset] ^= 1 << (offset // step % 8)
        read_damaged(bytes(damaged))
    return len(WIRE)


def test_no_flipped_bit_ends_the_process() -> None:
    program = "from tests.malformed.test_wire import flip_every_byte; print(flip_every_byte(0, 1))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (found.returncode, found.stdout.strip()) == (0, str(len(WIRE))), found.stderr


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(WIRE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_bytes_are_read_whole_or_refused_in_one_sentence(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(WIRE)
    for offset, value in changes:
        damaged[offset] = value
    read_damaged(bytes(damaged))
