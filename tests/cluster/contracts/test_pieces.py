"""What arrives of bytes that were sent from several places of memory."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import ray

from cluster.contracts.pieces import ALIGNMENT, SMALLEST_PIECE, Pieces
from cluster.contracts.trajectory import make_generated
from cluster.contracts.wire import from_wire, wire_pieces
from tests.builders import make_trajectory

SIZES = [
    (),
    (0,),
    (3,),
    (SMALLEST_PIECE + 70, 5, 2 * SMALLEST_PIECE),
    (1, 2 * SMALLEST_PIECE - 1, 7, SMALLEST_PIECE + 63),
]


def random_buffers(sizes: tuple[int, ...]) -> list[bytes]:
    return [np.random.default_rng(size).bytes(size) for size in sizes]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_bytes_arrive_in_their_order(sizes: tuple[int, ...]) -> None:
    buffers = random_buffers(sizes)
    pieces = Pieces(buffers)
    assert pieces.size == sum(sizes)
    assert (
        pickle.loads(pickle.dumps(pieces, protocol=5)).to_pybytes() == pieces.joined().to_pybytes() == b"".join(buffers)
    )


@pytest.mark.parametrize("sizes", SIZES[3:])
def test_large_pieces_are_not_copied_before_they_are_sent(sizes: tuple[int, ...]) -> None:
    originals = [pa.py_buffer(buffer) for buffer in random_buffers(sizes)]
    out_of_band: list[pickle.PickleBuffer] = []
    pickle.dumps(Pieces(originals), protocol=5, buffer_callback=out_of_band.append)
    sent = [pa.py_buffer(buffer) for buffer in out_of_band]
    assert all(piece.size % ALIGNMENT == 0 for piece in sent[:-1])
    in_place = [
        piece.size for piece in sent for one in originals if 0 <= piece.address - one.address < max(1, one.size)
    ]
    assert sum(in_place) > sum(one.size for one in originals if one.size >= SMALLEST_PIECE) - 4 * ALIGNMENT


def test_pieces_that_lie_without_gaps_are_not_copied_when_they_arrive() -> None:
    out_of_band: list[pickle.PickleBuffer] = []
    pieces = Pieces(random_buffers(SIZES[-1]))
    pickled = pickle.dumps(pieces, protocol=5, buffer_callback=out_of_band.append)
    store, start, buffers = np.empty(pieces.size, np.uint8), 0, []
    for buffer in out_of_band:
        end = start + buffer.raw().nbytes
        store[start:end] = np.frombuffer(buffer, np.uint8)
        buffers.append(store[start:end])
        start = end
    arrived = pickle.loads(pickled, buffers=buffers)
    assert (arrived.address, arrived.size) == (store.ctypes.data, pieces.size)


def test_rays_object_store_keeps_the_pieces_without_gaps(ray_cluster: None) -> None:
    batch = make_generated([make_trajectory(completion=range(1, 100_000))])
    reference = ray.put(wire_pieces(batch))
    one, other = ray.get(reference), ray.get(reference)
    assert one.address == other.address  # a copy would lie elsewhere
    assert from_wire(one).equals(batch)
    del reference, other
    assert from_wire(one).equals(batch)  # what is left of it keeps the object
