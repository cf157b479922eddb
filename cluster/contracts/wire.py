"""The wire encoding of a trajectory batch: what passes between actors, instead of pickles of Arrow objects."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from cluster.contracts.errors import TrajectoryError
from cluster.contracts.trajectory import SCHEMA_VERSION, Stage, check_values, generated_schema, stage_of

HIDDEN_TYPES = (pa.float32(), pa.float16(), pa.uint16())


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
    batch = _read_stream(wire)
    found = batch.schema.metadata or {}
    if found.get(b"preceptor.trajectory") != SCHEMA_VERSION.encode():
        raise TrajectoryError(
            f"wire: trajectory schema version {found.get(b'preceptor.trajectory')!r}, expected {SCHEMA_VERSION}; "
            "run the same release on every node"
        )
    _check_schema(batch.schema)
    if stage is not None and stage_of(batch) != stage:
        raise TrajectoryError(f"wire: batch is '{stage_of(batch)}', expected '{stage}'")
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if not field.nullable and _num_nulls(column):
            raise TrajectoryError(f"wire: column '{field.name}' holds nulls; the bytes were damaged on their way")
    check_values(batch)
    return batch


def _read_stream(wire: pa.Buffer | bytes | memoryview) -> pa.RecordBatch:
    """Decode one batch whose offsets and lengths stay inside of its buffers.

    Arrow reads damaged offsets without complaint, and the first look at their values would end the process. Checking
    them costs time by the row and not by the token: 40 microseconds for 14 MB.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(wire)) as reader:
            batch = reader.read_next_batch()
        batch.validate(full=True)
        _ = batch.schema.names  # decodes them: Arrow leaves names as bytes until somebody asks
    except (pa.ArrowException, OSError, StopIteration, UnicodeDecodeError) as error:
        raise TrajectoryError(f"wire: not an Arrow trajectory batch: {error or 'the stream ends early'}") from error
    return batch


def _check_schema(schema: pa.Schema) -> None:
    """Check that the columns are those of a trajectory, each of its type and in its place."""
    models = [name for name in schema.metadata.get(b"models", b"").decode(errors="replace").split(",") if name]
    if schema.metadata.get(b"stage") != (b"scored" if models else b"generated"):
        raise TrajectoryError(f"wire: stage {schema.metadata.get(b'stage')!r} does not go with the scores of {models}")
    expected = generated_schema()
    for position, field in enumerate(expected):
        found = schema.field(position) if position < len(schema) else None
        if found is None or not found.equals(field):
            raise TrajectoryError(f"wire: column {position} is {_describe(found)}, expected {_describe(field)}")
    further = list(schema)[len(expected) :]
    known = _further_fields(models, further)
    names = [field.name for field in further]
    for field in further:
        if names.count(field.name) > 1 or not any(field.equals(one) for one in known.get(field.name, ())):
            raise TrajectoryError(
                f"wire: column {_describe(field)} is unknown, of another type or width, or there twice"
            )
    missing = {f"{model}_logprobs" for model in models} - set(names)
    if missing:
        raise TrajectoryError(f"wire: column '{min(missing)}' is missing; the batch says that {models} scored it")


def _further_fields(models: Sequence[str], found: Sequence[pa.Field]) -> dict[str, list[pa.Field]]:
    """Return what candidates and scores may look like; the width of hidden states is the model's own."""
    width = next((_width(field) for field in found if field.name == "candidate_ids"), 0)
    numbers = pa.list_(pa.float32())
    known = {f"{model}_{name}": [numbers] for model in models for name in ("logprobs", "entropy")}
    if width:
        candidates = pa.list_(pa.list_(pa.float32(), width))
        known |= {"candidate_ids": [pa.list_(pa.list_(pa.int32(), width))], "candidate_rollout_logprobs": [candidates]}
        known |= {f"{model}_candidate_logprobs": [candidates] for model in models}
    for field in found:
        if field.name in {f"{model}_hidden" for model in models} and _width(field):
            known[field.name] = [pa.list_(pa.list_(dtype, _width(field))) for dtype in HIDDEN_TYPES]
    return {name: [pa.field(name, dtype, nullable=False) for dtype in types] for name, types in known.items()}


def _describe(field: pa.Field | None) -> str:
    return "missing" if field is None else f"'{field.name}: {field.type}'"


def _width(field: pa.Field) -> int:
    """Return the fixed length of a column's lists of lists; 0 where it is none."""
    item = field.type.value_type if pa.types.is_list(field.type) else field.type
    return int(item.list_size) if pa.types.is_fixed_size_list(item) else 0


def _num_nulls(column: pa.Array) -> int:
    """Count the nulls of a column and of the lists in it."""
    inner = column.values if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else None
    return int(column.null_count) + (0 if inner is None else _num_nulls(inner))
