"""The wire encoding of a trajectory batch: what passes between actors, instead of pickles of Arrow objects."""

from typing import Any

import pyarrow as pa

from cluster.contracts.errors import TrajectoryError
from cluster.contracts.trajectory import SCHEMA_VERSION, Stage, stage_of


def to_wire(batch: pa.RecordBatch) -> pa.Buffer:
    """Encode as Arrow IPC. IPC drops what a slice does not show; pickling the slice would ship its whole parent.

    Example:
        >>> from cluster.contracts.trajectory import make_generated
        >>> from_wire(to_wire(make_generated([]))).num_rows
        0
    """
    # A buffer that grows while it is written is copied several times; the first pass only counts.
    counted = pa.MockOutputStream()
    _write_stream(counted, batch)
    wire: pa.Buffer = pa.allocate_buffer(counted.size())
    with pa.FixedSizeBufferWriter(wire) as sink:
        _write_stream(sink, batch)
    return wire


def _write_stream(sink: Any, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)


def from_wire(wire: pa.Buffer | bytes | memoryview, stage: Stage | None = None) -> pa.RecordBatch:
    """Decode `to_wire`'s bytes without copying the values; the batch keeps the buffer alive.

    Raises:
        TrajectoryError: the bytes are not a trajectory batch of this schema version, or not of the stage asked for.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(wire)) as reader:
            batch = reader.read_next_batch()
    except (pa.ArrowInvalid, StopIteration) as error:
        raise TrajectoryError(f"wire: not an Arrow trajectory batch: {error}") from error
    found = batch.schema.metadata or {}
    if found.get(b"preceptor.trajectory") != SCHEMA_VERSION.encode():
        raise TrajectoryError(
            f"wire: trajectory schema version {found.get(b'preceptor.trajectory')!r}, expected {SCHEMA_VERSION}; "
            "run the same release on every node"
        )
    if stage is not None and stage_of(batch) != stage:
        raise TrajectoryError(f"wire: batch is '{stage_of(batch)}', expected '{stage}'")
    return batch
