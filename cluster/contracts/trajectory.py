"""The Arrow schema of a trajectory batch, its constructors and its checks; `wire.py` encodes it.

One row is one trajectory: a prompt, and what the student sampled and read after it. Most episodes are one row, whose
`trajectory_id` is the `episode_id`. Where the student is to read what does not continue what it has read and sampled,
the episode goes on in a further row (`row_id`); `turn` counts the episode's completions before a row's first. `sampler`
says which model sampled the row, and the finish reason "environment_error" that its environment failed: such a row has
no sampled token.

Three kinds of list column exist, and nothing else does:

- per token (`token_ids`, `loss_mask`): one value per prompt or completion token;
- per completion token (`rollout_logprobs`, the candidates and every scoring model's columns): one value, or one list of
  fixed length, per token whose `loss_mask` is 1, in order. Prompt positions are never scored and never shipped;
- per policy version after the first (`version_changes`): the completion token at which it begins to write.

Candidates are further tokens per position on which models are compared, chosen by the student or by its teacher. Each
scoring model adds columns under its role in the objective's target: `teacher_logprobs`, `base_logprobs`, and so on; and
`teacher_version`, one value per row: after how many optimizer steps a teacher that is the student took the weights that
scored the row (0: those that the run began with, or of another model).

A scoring model may read another prompt than the student's: a batch of a run with such models has a list column for each
of them, `teacher_prompt_ids`, and `context_hash`; `scorer_prompts.py` reads them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.contracts.columns import Bytes as Bytes
from cluster.contracts.columns import FinishReason as FinishReason
from cluster.contracts.columns import Floats as Floats
from cluster.contracts.columns import Ints as Ints
from cluster.contracts.columns import Ragged as Ragged
from cluster.contracts.columns import check_rows
from cluster.contracts.columns import ragged as ragged
from cluster.contracts.errors import NotFiniteError, ScoreError, TrajectoryError, WrongLengthError
from cluster.contracts.signals import SIGNALS, Scores, Signal, find_signal, find_signals, is_finite

Stage = Literal["generated", "scored"]

SCHEMA_VERSION = "5"
STUDENT = "student"  # the sampler of ordinary rows
ROWS_APART = 1 << 40  # between the ids of an episode's rows; ids of requests are below it

_GENERATED_FIELDS = [
    pa.field("trajectory_id", pa.int64(), nullable=False),  # unique in the run
    pa.field("prompt_id", pa.int64(), nullable=False),  # line of the prompt file, from 0
    pa.field("sample_index", pa.int32(), nullable=False),  # 0 .. samples_per_prompt - 1
    pa.field("teacher", pa.string(), nullable=False),  # route: the NAME of [teachers.NAME]
    pa.field("domain", pa.string(), nullable=False),
    pa.field("min_policy_version", pa.int64(), nullable=False),
    pa.field("max_policy_version", pa.int64(), nullable=False),  # above min: weights changed while it was sampled
    pa.field("version_changes", pa.list_(pa.int32()), nullable=False),  # entry i: where version min + i + 1 begins
    pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
    pa.field("loss_mask", pa.list_(pa.uint8()), nullable=False),  # 1 where the student sampled
    pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),  # under the sampling distribution
    pa.field("finish_reason", pa.string(), nullable=False),
    pa.field("reward", pa.float32(), nullable=True),  # null: the prompt has no answer to verify against
    pa.field("episode_id", pa.int64(), nullable=False),  # the id of the request, and of the episode's first row
    pa.field("turn", pa.int32(), nullable=False),  # completions of the episode before this row's first
    pa.field("sampler", pa.string(), nullable=False),
]
CONTEXT_HASH = pa.field("context_hash", pa.string(), nullable=False)


@dataclass(frozen=True)
class GeneratedTrajectory:
    """Holds one row of a generated batch."""

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
    # [max - min policy version] completion tokens before each further version; one that wrote nothing has the same
    # entry as the next.
    version_changes: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    candidate_ids: Ints | None = None  # [completion_tokens, k] tokens that the student chose besides the sampled one
    candidate_rollout_logprobs: Floats | None = None  # [completion_tokens, k] under the sampling distribution
    # By scoring model: the token ids that it reads in the place of the prompt; none: the student's prompt. Rows of one
    # batch have the same models here.
    scorer_prompts: Mapping[str, Ints] = field(default_factory=dict)
    context_hash: str = ""  # of the templates and inputs behind `scorer_prompts`; "": all models read the same prompt
    episode_id: int | None = None  # None: the row is an episode by itself, of the same id
    turn: int = 0
    sampler: str = STUDENT

    @property
    def episode(self) -> int:
        """Return the id of the row's episode, which is the id of the request."""
        return self.trajectory_id if self.episode_id is None else self.episode_id


def row_id(episode_id: int, index: int) -> int:
    """Return the trajectory id of one of an episode's rows, from 0; the first has the episode's own.

    Example:
        >>> row_id(7, 0), row_id(7, 1) % ROWS_APART
        (7, 7)
    """
    return episode_id + index * ROWS_APART


def prompt_field(model: str) -> pa.Field:
    """Return the column of the prompts that a scoring model reads; an empty list stands for the student's prompt."""
    return pa.field(f"{model}_prompt_ids", pa.list_(pa.int32()), nullable=False)


def version_field(model: str) -> pa.Field:
    """Return the column that says which version of a scoring model's weights scored each row."""
    return pa.field(f"{model}_version", pa.int64(), nullable=False)


def generated_schema(num_candidates: int = 0, prompted_models: Sequence[str] = ()) -> pa.Schema:
    """Return the schema of a batch that no model has scored.

    It has so many candidates chosen by the student, and prompts of their own for `prompted_models`.
    """
    fields = list(_GENERATED_FIELDS)
    if num_candidates:
        for name, item in (("candidate_ids", pa.int32()), ("candidate_rollout_logprobs", pa.float32())):
            fields.append(pa.field(name, pa.list_(pa.list_(item, num_candidates)), nullable=False))
    metadata = {"preceptor.trajectory": SCHEMA_VERSION, "stage": "generated", "models": ""}
    if prompted_models:
        fields += [*map(prompt_field, prompted_models), CONTEXT_HASH]
        metadata["prompts"] = ",".join(prompted_models)
    return pa.schema(fields, metadata=metadata)


def masked(row: GeneratedTrajectory) -> GeneratedTrajectory:
    """Return a row of which nothing is scored or learned from; its tokens and its reward stay."""
    return replace(
        row,
        max_policy_version=row.min_policy_version,
        version_changes=np.empty(0, np.int32),
        loss_mask=np.zeros_like(row.loss_mask),
        rollout_logprobs=row.rollout_logprobs[:0],
        candidate_ids=None if row.candidate_ids is None else row.candidate_ids[:0],
        candidate_rollout_logprobs=None
        if row.candidate_rollout_logprobs is None
        else row.candidate_rollout_logprobs[:0],
    )


def make_generated(rows: Sequence[GeneratedTrajectory]) -> pa.RecordBatch:
    """Build a generated batch.

    Raises:
        TrajectoryError: a column's length does not fit its row's tokens, rows have different numbers of candidates or
            prompts for different models, or a log-probability is not finite.
    """
    widths = {0 if row.candidate_ids is None else row.candidate_ids.shape[1] for row in rows}
    if len(widths) > 1:
        raise TrajectoryError(f"rows of one batch have different numbers of candidates: {sorted(widths)}")
    prompted = {tuple(row.scorer_prompts) for row in rows}
    if len(prompted) > 1:
        raise TrajectoryError(f"rows of one batch have prompts for different models: {sorted(prompted)}")
    models = prompted.pop() if prompted else ()
    schema = generated_schema(widths.pop() if widths else 0, models)
    prompts = {prompt_field(model).name: [row.scorer_prompts[model] for row in rows] for model in models}
    given: dict[str, list[Any]] = {**prompts, "episode_id": [row.episode for row in rows]}
    columns = [_column(field, given.get(field.name) or [getattr(row, field.name) for row in rows]) for field in schema]
    batch = pa.record_batch(columns, schema=schema)
    check_values(batch)
    return batch


def add_scores(batch: pa.RecordBatch, model: str, scores: Scores, version: int = 0) -> pa.RecordBatch:
    """Return the batch with one more model's columns; the present columns are shared, not copied.

    `model` is the scorer's role in the objective's target: "teacher", "base", ...; `version` is of its weights.

    Raises:
        ScoreError: the model has scored this batch before, a column is of the wrong shape, or a value is not finite.
    """
    if model in models_in(batch.schema):
        raise ScoreError(f"the batch already has the scores of '{model}'")
    signals = {name: find_signal(name) for name in scores}
    _check_scores(batch, model, {signals[name]: values for name, values in scores.items()})
    offsets = batch["rollout_logprobs"].offsets
    offsets = pc.subtract(offsets, offsets[0])  # a slice's offsets begin in the middle of its parent
    fields = [*batch.schema, version_field(model)]
    columns = [*batch.columns, pa.array(np.full(batch.num_rows, version, np.int64))]
    for name in sorted(signals, key=[*SIGNALS, *signals].index):
        columns.append(list_column(offsets, scores[name]))
        fields.append(pa.field(signals[name].column(model), columns[-1].type, nullable=False))
    models = ",".join([*models_in(batch.schema), model])
    metadata = {**batch.schema.metadata, b"stage": b"scored", b"models": models.encode()}
    further = {**dict.fromkeys(signal_paths(batch.schema)), **dict.fromkeys(signals.keys() - SIGNALS.keys())}
    if further:
        metadata[b"signals"] = ",".join(further).encode()
    return pa.record_batch(columns, schema=pa.schema(fields, metadata=metadata))


def check_values(batch: pa.RecordBatch) -> None:
    """Check what holds in every row, generated or scored, with `check_rows`."""
    columns = sampled_columns(batch.schema)
    present = {name: columns[name].is_rechecked for name in batch.schema.names if name in columns}
    check_rows(batch, present, get_args(FinishReason))
    for model in models_in(batch.schema):
        if (batch[version_field(model).name].to_numpy() < 0).any():
            raise TrajectoryError(f"{version_field(model).name} is negative")
    for model in prompted_models_in(batch.schema):
        if (ragged(batch, prompt_field(model).name).values < 0).any():
            raise TrajectoryError(f"{prompt_field(model).name} holds a negative token id")


def sampled_columns(schema: pa.Schema) -> dict[str, Signal]:
    """Return the columns of one entry per sampled token that a batch with these models and signals may have."""
    signals = find_signals(signal_paths(schema))
    return {
        "rollout_logprobs": SIGNALS["logprobs"],
        "candidate_ids": SIGNALS["candidate_ids"],
        "candidate_rollout_logprobs": SIGNALS["candidate_logprobs"],
        **{signal.column(model): signal for model in models_in(schema) for signal in signals},
    }


def stage_of(batch: pa.RecordBatch) -> Stage:
    """Return how far along the flow the batch is."""
    return "scored" if batch.schema.metadata[b"stage"] == b"scored" else "generated"


def models_in(schema: pa.Schema) -> list[str]:
    """Return the models that have scored a batch of this schema, in that order."""
    return _listed(schema, b"models")


def prompted_models_in(schema: pa.Schema) -> list[str]:
    """Return the models that read prompts of their own in a batch of this schema."""
    return _listed(schema, b"prompts")


def signal_paths(schema: pa.Schema) -> list[str]:
    """Return the import paths of the signals that a batch of this schema has besides those of our table."""
    return _listed(schema, b"signals")


def _listed(schema: pa.Schema, key: bytes) -> list[str]:
    return [name for name in schema.metadata.get(key, b"").decode(errors="replace").split(",") if name]


def strict_tokens(batch: pa.RecordBatch) -> NDArray[np.bool_] | None:
    """Return which completion tokens all models scored, [completion_tokens]; None: all tokens are.

    A teacher with a tokenizer of its own scores only where its tokens and the student's coincide.
    """
    names = [SIGNALS["aligned"].column(model) for model in models_in(batch.schema)]
    columns = [ragged(batch, name).values != 0 for name in names if name in batch.schema.names]
    return np.logical_and.reduce(columns) if columns else None


def num_candidates_of(batch: pa.RecordBatch) -> int:
    """Return how many candidates each completion token has; 0 when there are none."""
    if "candidate_ids" not in batch.schema.names:
        return 0
    return int(batch.schema.field("candidate_ids").type.value_type.list_size)


def _column(field: pa.Field, values: list[Any]) -> pa.Array:
    if not pa.types.is_list(field.type):
        return pa.array(values, type=field.type)
    item = field.type.value_type
    is_fixed = pa.types.is_fixed_size_list(item)
    dtype = (item.value_type if is_fixed else item).to_pandas_dtype()
    empty: NDArray[Any] = np.empty((0, item.list_size) if is_fixed else 0, dtype)
    offsets = pa.array(np.cumsum([0, *(len(value) for value in values)], dtype=np.int32))
    return list_column(offsets, np.concatenate([empty, *values]).astype(dtype, copy=False))


def list_column(offsets: pa.Array, values: NDArray[Any]) -> pa.Array:
    """Make a list column of [total] values or [total, width] rows without copying them."""
    inner = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        inner = pa.FixedSizeListArray.from_arrays(inner, values.shape[1])
    return pa.ListArray.from_arrays(offsets, inner)


def _check_scores(batch: pa.RecordBatch, model: str, scores: Mapping[Signal, NDArray[Any]]) -> None:
    if SIGNALS["logprobs"] not in scores:
        raise ScoreError(f"{model} has no logprobs; every model scores the sampled tokens")
    chosen = scores.get(SIGNALS["candidate_ids"])
    if chosen is not None and num_candidates_of(batch):
        raise ScoreError(f"{model} chose candidates, but the batch already has some")
    num_candidates = num_candidates_of(batch) if chosen is None else chosen.shape[1]
    offsets = ragged(batch, "rollout_logprobs").offsets
    total = int(offsets[-1])
    for signal, values in scores.items():
        widths = {"one": (), "candidates": (num_candidates,), "model": values.shape[1:]}
        shape = (total, *widths[signal.width])
        if values.shape != shape:
            raise WrongLengthError(
                f"{model} {signal.name} have shape {list(values.shape)}, the batch needs {list(shape)}"
            )
        if pa.from_numpy_dtype(values.dtype) not in signal.dtypes:
            raise ScoreError(
                f"{model} {signal.name} are {values.dtype}, expected {' or '.join(map(str, signal.dtypes))}"
            )
        finite = is_finite(values)
        if not finite.all():
            first = np.argmin(finite.reshape(total, -1).all(-1))  # completion token
            row = int(np.searchsorted(offsets, first, side="right")) - 1
            trajectory_id = batch["trajectory_id"][row].as_py()
            raise NotFiniteError(f"trajectory {trajectory_id}: {model} {signal.name} hold NaN or infinity")
