"""Encodes a trajectory batch as the bytes that pass between actors, instead of pickles of Arrow objects."""

from typing import Any

import pyarrow as pa

from cluster.contracts.errors import ConfigError, TrajectoryError
from cluster.contracts.pieces import Pieces
from cluster.contracts.trajectory import (
    CONTEXT_HASH,
    SCHEMA_VERSION,
    STUDENT,
    Stage,
    check_values,
    generated_schema,
    models_in,
    prompt_field,
    prompted_models_in,
    sampled_columns,
    stage_of,
    version_field,
)

BEFORE_EPISODES = b"4"  # the version without the columns `episode_id`, `turn` and `sampler`


def to_wire(batch: pa.RecordBatch) -> pa.Buffer:
    """Encode as Arrow IPC in one buffer; `wire_pieces` does so without copying the values.

    Example:
        >>> from cluster.contracts.trajectory import make_generated
        >>> from_wire(to_wire(make_generated([]))).num_rows
        0
    """
    return wire_pieces(batch).joined()


def wire_pieces(batch: pa.RecordBatch) -> Pieces:
    """Encode as Arrow IPC. IPC drops what a slice does not show; pickling the slice would ship its whole parent."""
    sink = _Sink()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return Pieces(sink.written)


class _Sink:
    """Collects what Arrow writes to a file, which are views of the batch's columns and a few bytes between them."""

    closed = False

    def __init__(self) -> None:
        self.written: list[Any] = []

    def write(self, buffer: Any) -> int:
        self.written.append(buffer)
        return len(buffer)

    def flush(self) -> None:
        """Do nothing: what was written is there."""


def from_wire(wire: pa.Buffer | bytes | memoryview, stage: Stage | None = None) -> pa.RecordBatch:
    """Decode `to_wire`'s bytes without copying the values; the batch keeps the buffer alive.

    A batch that the release before recorded gets the columns that it lacks.

    Raises:
        TrajectoryError: the bytes are not a trajectory batch of this schema version, or not of that stage.
    """
    batch = _read_stream(wire)
    version = (batch.schema.metadata or {}).get(b"preceptor.trajectory")
    if version == BEFORE_EPISODES:
        batch = _with_episodes(batch)
    elif version != SCHEMA_VERSION.encode():
        raise TrajectoryError(
            f"wire: trajectory schema version {version!r}, expected {SCHEMA_VERSION}; "
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
        _ = batch.schema.names  # decodes them: Arrow leaves names as bytes until they are read
    except (pa.ArrowException, OSError, StopIteration, UnicodeDecodeError) as error:
        raise TrajectoryError(f"wire: not an Arrow trajectory batch: {error or 'the stream ends early'}") from error
    return batch


def _with_episodes(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch with the columns by which each row is an episode of the student's by itself."""
    names = batch.schema.names
    if names.count("trajectory_id") != 1 or "reward" not in names:
        return batch  # which the check of the schema refuses
    added = {
        "episode_id": batch["trajectory_id"],
        "turn": pa.array([0] * batch.num_rows, pa.int32()),
        "sampler": pa.array([STUDENT] * batch.num_rows),
    }
    position = names.index("reward") + 1
    fields, columns = list(batch.schema), list(batch.columns)
    fields[position:position] = [pa.field(name, column.type, nullable=False) for name, column in added.items()]
    columns[position:position] = added.values()
    metadata = {**batch.schema.metadata, b"preceptor.trajectory": SCHEMA_VERSION.encode()}
    return pa.record_batch(columns, schema=pa.schema(fields, metadata=metadata))


def _check_schema(schema: pa.Schema) -> None:
    """Check that the columns are those of a trajectory, each of its type and in its place."""
    models = models_in(schema)
    if schema.metadata.get(b"stage") != (b"scored" if models else b"generated"):
        raise TrajectoryError(f"wire: stage {schema.metadata.get(b'stage')!r} does not go with the scores of {models}")
    expected = generated_schema()
    for position, field in enumerate(expected):
        present = schema.field(position) if position < len(schema) else None
        if present is None or not present.equals(field):
            raise TrajectoryError(f"wire: column {position} is {_describe(present)}, expected {_describe(field)}")
    further = list(schema)[len(expected) :]
    names = [field.name for field in further]
    _check_further(schema, further, names)
    scored = f"{models} scored it"
    needed = {name: scored for model in models for name in (f"{model}_logprobs", version_field(model).name)}
    needed |= dict.fromkeys(_prompt_types(schema), "models read prompts of their own")
    for name in sorted(needed.keys() - set(names)):
        raise TrajectoryError(f"wire: column '{name}' is missing; the batch says that {needed[name]}")


def _check_further(schema: pa.Schema, further: list[pa.Field], names: list[str]) -> None:
    """Check the columns that follow those of every batch; `names` are theirs."""
    try:
        signals = sampled_columns(schema)
    except ConfigError as error:
        raise TrajectoryError(f"wire: {error}") from error
    of_rows = {field.name: field.type for field in map(version_field, models_in(schema))} | _prompt_types(schema)
    num_candidates = next((_width(field) for field in further if field.name == "candidate_ids"), 0)
    for field in further:
        types = [of_rows[field.name]] if field.name in of_rows else []
        if field.name in signals:
            types = signals[field.name].arrow_types(num_candidates, _width(field))
        if names.count(field.name) > 1 or field.nullable or not any(field.type.equals(one) for one in types):
            raise TrajectoryError(
                f"wire: column {_describe(field)} is unknown, of another type or width, or there twice"
            )


def _prompt_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Return the columns of the prompts that scoring models read instead of the student's."""
    models = prompted_models_in(schema)
    return {field.name: field.type for field in [*map(prompt_field, models), CONTEXT_HASH] if models}


def _describe(field: pa.Field | None) -> str:
    return "missing" if field is None else f"'{field.name}: {field.type}'"


def _width(field: pa.Field) -> int:
    """Return the fixed length of a column's lists of lists; 0 where it is none."""
    item = field.type.value_type if pa.types.is_list(field.type) else field.type
    return int(item.list_size) if pa.types.is_fixed_size_list(item) else 0


def _num_nulls(column: pa.Array) -> int:
    inner = column.values if isinstance(column, pa.ListArray | pa.FixedSizeListArray) else None
    return int(column.null_count) + (0 if inner is None else _num_nulls(inner))
