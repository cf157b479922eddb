"""The Arrow schema of a trajectory batch, its constructors, its checks and its wire encoding.

One row is one trajectory: a prompt and one completion. Two kinds of list column exist, and nothing else does:

- per token (`token_ids`, `loss_mask`): one value per prompt or completion token;
- per completion token (`rollout_logprobs` and every teacher column): one value per token whose `loss_mask` is 1, in
  order. Prompt positions are never scored and never shipped.

The stage ("generated" or "scored") and the width of the teacher's top-k stand in the schema's metadata, so a batch
without scores cannot pass for one with them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.contracts.errors import ScoreError, TrajectoryError

Stage = Literal["generated", "scored"]
FinishReason = Literal["stop", "length", "abort"]
Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bytes = NDArray[np.uint8]

SCHEMA_VERSION = "1"

_GENERATED_FIELDS = [
    pa.field("trajectory_id", pa.int64(), nullable=False),  # unique in the run
    pa.field("prompt_id", pa.int64(), nullable=False),  # line of the prompt file, from 0
    pa.field("sample_index", pa.int32(), nullable=False),  # 0 .. samples_per_prompt - 1
    pa.field("teacher", pa.string(), nullable=False),  # route: the NAME of [teachers.NAME]
    pa.field("domain", pa.string(), nullable=False),
    pa.field("min_policy_version", pa.int64(), nullable=False),
    pa.field("max_policy_version", pa.int64(), nullable=False),  # above min: weights changed while it was written
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("loss_mask", pa.list_(pa.uint8()), nullable=False),  # 1 where the student sampled
    pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),  # under the sampling distribution
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("reward", pa.float32(), nullable=True),  # null: the prompt has no answer to verify against
]


@dataclass(frozen=True)
class GeneratedTrajectory:
    """One row of a generated batch."""

    trajectory_id: int
    prompt_id: int
    sample_index: int
    teacher: str
    domain: str
    min_policy_version: int
    max_policy_version: int
    token_ids: Ints  # [tokens] prompt, then completion
    loss_mask: Bytes  # [tokens]
    rollout_logprobs: Floats  # [completion_tokens]
    finish_reason: FinishReason
    reward: float | None


@dataclass(frozen=True)
class TeacherScores:
    """What one teacher says of one trajectory; natural logarithms at temperature 1."""

    logprobs: Floats  # [completion_tokens] of the sampled tokens
    topk_ids: Ints | None = None  # [completion_tokens, k] the teacher's most likely tokens, best first
    topk_logprobs: Floats | None = None  # [completion_tokens, k]


@dataclass(frozen=True)
class Ragged:
    """A list column as numpy views: row i is `values[offsets[i]:offsets[i + 1]]`."""

    values: NDArray[Any]  # [total] or [total, k]
    offsets: NDArray[np.int64]  # [rows + 1], first is 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[Any]:
        """Return a view of one row's values."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of values per row."""
        return np.diff(self.offsets)


def generated_schema() -> pa.Schema:
    """Return the schema of a batch that no teacher has seen."""
    return pa.schema(_GENERATED_FIELDS, metadata=_metadata("generated", top_k=0))


def scored_schema(top_k: int) -> pa.Schema:
    """Return the schema of a scored batch; `top_k = 0` is the `sampled` signal."""
    fields = [*_GENERATED_FIELDS, pa.field("teacher_logprobs", pa.list_(pa.float32()), nullable=False)]
    if top_k:
        ids, logprobs = pa.list_(pa.int32(), top_k), pa.list_(pa.float32(), top_k)
        fields.append(pa.field("teacher_topk_ids", pa.list_(ids), nullable=False))
        fields.append(pa.field("teacher_topk_logprobs", pa.list_(logprobs), nullable=False))
    return pa.schema(fields, metadata=_metadata("scored", top_k))


def make_generated(rows: Sequence[GeneratedTrajectory]) -> pa.RecordBatch:
    """Build a generated batch.

    Raises:
        TrajectoryError: a column's length does not fit its row's tokens, or a log-probability is not finite.
    """
    for row in rows:
        _check_row(row)
    schema = generated_schema()
    columns = [_column(field, [getattr(row, field.name) for row in rows]) for field in schema]
    return pa.record_batch(columns, schema=schema)


def add_scores(batch: pa.RecordBatch, scores: Sequence[TeacherScores]) -> pa.RecordBatch:
    """Return the batch with the teacher's columns; the generated columns are shared, not copied.

    Raises:
        ScoreError: a teacher column is missing, of the wrong length, or not finite.
    """
    if len(scores) != batch.num_rows:
        raise ScoreError(f"teacher returned {len(scores)} scores for {batch.num_rows} trajectories")
    expected = ragged(batch, "rollout_logprobs").lengths
    top_k = _common_top_k(scores)
    for row, score in enumerate(scores):
        _check_scores(batch["trajectory_id"][row].as_py(), score, int(expected[row]))
    schema = scored_schema(top_k)
    columns = [batch[field.name] for field in generated_schema()]
    columns.append(_column(schema.field("teacher_logprobs"), [score.logprobs for score in scores]))
    if top_k:
        columns.append(_column(schema.field("teacher_topk_ids"), [score.topk_ids for score in scores]))
        columns.append(_column(schema.field("teacher_topk_logprobs"), [score.topk_logprobs for score in scores]))
    return pa.record_batch(columns, schema=schema)


def to_wire(batch: pa.RecordBatch) -> pa.Buffer:
    """Encode as Arrow IPC. IPC drops what a slice does not show; pickling the slice would ship its whole parent.

    Example:
        >>> from_wire(to_wire(make_generated([]))).num_rows
        0
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


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


def stage_of(batch: pa.RecordBatch) -> Stage:
    """Return how far along the flow the batch is."""
    return "scored" if batch.schema.metadata[b"stage"] == b"scored" else "generated"


def top_k_of(batch: pa.RecordBatch) -> int:
    """Return the width of the teacher's top-k columns; 0 when there are none."""
    return int(batch.schema.metadata[b"top_k"])


def ragged(batch: pa.RecordBatch, name: str) -> Ragged:
    """View a list column; top-k columns come as [total, k]."""
    column = batch[name]
    offsets = column.offsets.to_numpy().astype(np.int64)
    values = column.values.slice(offsets[0], offsets[-1] - offsets[0])
    if pa.types.is_fixed_size_list(values.type):
        flat = values.flatten().to_numpy().reshape(-1, values.type.list_size)
    else:
        flat = values.to_numpy()
    return Ragged(flat, offsets - offsets[0])


def _metadata(stage: Stage, top_k: int) -> dict[str, str]:
    return {"preceptor.trajectory": SCHEMA_VERSION, "stage": stage, "top_k": str(top_k)}


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not pa.types.is_list(field.type):
        return pa.array(values, type=field.type)
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    if pa.types.is_fixed_size_list(field.type.value_type):
        width, item = field.type.value_type.list_size, field.type.value_type.value_type
        flat = np.concatenate(values).reshape(-1) if values else np.empty(0)
        inner = pa.FixedSizeListArray.from_arrays(pa.array(flat, type=item), width)
        return pa.ListArray.from_arrays(offsets, inner, type=field.type)
    flat = np.concatenate(values) if values else np.empty(0)
    return pa.ListArray.from_arrays(offsets, pa.array(flat, type=field.type.value_type), type=field.type)


def _check_row(row: GeneratedTrajectory) -> None:
    where = f"trajectory {row.trajectory_id}"
    if len(row.loss_mask) != len(row.token_ids):
        raise TrajectoryError(
            f"{where}: loss_mask has {len(row.loss_mask)} values for {len(row.token_ids)} tokens; "
            "every per-token column must have one value per token"
        )
    completion_tokens = int(np.count_nonzero(row.loss_mask))
    if len(row.rollout_logprobs) != completion_tokens:
        raise TrajectoryError(
            f"{where}: rollout_logprobs has {len(row.rollout_logprobs)} values for {completion_tokens} completion "
            "tokens"
        )
    if len(row.loss_mask) and row.loss_mask[0]:
        raise TrajectoryError(f"{where}: the first token is marked as sampled, but nothing precedes it")
    if not np.isfinite(row.rollout_logprobs).all():
        raise TrajectoryError(f"{where}: rollout_logprobs holds NaN or infinity; the student may have diverged")


def _common_top_k(scores: Sequence[TeacherScores]) -> int:
    widths = {0 if score.topk_ids is None else score.topk_ids.shape[1] for score in scores}
    if len(widths) > 1:
        raise ScoreError(f"teacher returned top-k columns of different widths in one batch: {sorted(widths)}")
    return widths.pop() if widths else 0


def _check_scores(trajectory_id: int, score: TeacherScores, completion_tokens: int) -> None:
    columns = {"logprobs": score.logprobs, "top-k ids": score.topk_ids, "top-k logprobs": score.topk_logprobs}
    for name, values in columns.items():
        if values is None:
            continue
        if len(values) != completion_tokens:
            raise ScoreError(
                f"trajectory {trajectory_id}: teacher {name} cover {len(values)} tokens, "
                f"the completion has {completion_tokens}"
            )
    for name in ("logprobs", "top-k logprobs"):
        values = columns[name]
        if values is not None and not np.isfinite(values).all():
            raise ScoreError(f"trajectory {trajectory_id}: teacher {name} hold NaN or infinity")
