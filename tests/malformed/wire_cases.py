"""Trajectory batches and bytes that break the contract, each with words that its error must contain."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.contracts.trajectory import add_scores, make_generated
from cluster.contracts.wire import to_wire
from tests.builders import make_scores, make_trajectory


def scored_batch() -> pa.RecordBatch:
    changed = {"max_policy_version": 1, "version_changes": np.array([2], np.int32)}
    rows = [
        make_trajectory(trajectory_id=7, reward=1.0),
        make_trajectory(trajectory_id=8, completion=(9, 9), domain="x"),
        make_trajectory(trajectory_id=9, **changed),
    ]
    scores = make_scores(8, top_k=2)
    hidden = {"logprobs": scores["logprobs"], "hidden": np.ones((8, 4), np.uint16)}
    scores = {**scores, "entropy": np.ones(8, np.float32)}
    return add_scores(add_scores(make_generated(rows), "teacher", scores), "base", hidden)


BATCH = scored_batch()
WIRE = to_wire(BATCH).to_pybytes()


def replaced(name: str, values: Any, dtype: pa.DataType | None = None) -> pa.RecordBatch:
    """Return the batch with other values in a column."""
    index = BATCH.schema.get_field_index(name)
    array = values if isinstance(values, pa.Array) else pa.array(values, dtype or BATCH.schema.field(name).type)
    field = pa.field(name, array.type, BATCH.schema.field(name).nullable)
    schema = BATCH.schema.set(index, field)
    return pa.record_batch([*BATCH.columns[:index], array, *BATCH.columns[index + 1 :]], schema=schema)


def cell(name: str, row: int, change: Callable[[Any], Any]) -> pa.RecordBatch:
    """Return the batch with one row of a column changed."""
    values = BATCH[name].to_pylist()
    values[row] = change(values[row])
    return replaced(name, values)


def described(**metadata: str | None) -> pa.RecordBatch:
    """Return the batch with other metadata."""
    found = {key.decode(): value.decode() for key, value in BATCH.schema.metadata.items()} | metadata
    return BATCH.replace_schema_metadata({key: value for key, value in found.items() if value is not None})


def ordered(*names: str) -> pa.RecordBatch:
    return BATCH.select(list(names))


def several(*batches: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, BATCH.schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def as_file() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, BATCH.schema) as writer:
        writer.write_batch(BATCH)
    return sink.getvalue().to_pybytes()


NAMES = BATCH.schema.names
NAN, INF = float("nan"), float("inf")
WRONG_BATCHES: dict[str, tuple[pa.RecordBatch, str]] = {
    "no metadata": (BATCH.replace_schema_metadata(None), "trajectory schema version None, expected 5"),
    "older version": (described(**{"preceptor.trajectory": "3"}), "trajectory schema version b'3', expected 5"),
    "newer version": (described(**{"preceptor.trajectory": "6"}), "run the same release on every node"),
    "version empty": (described(**{"preceptor.trajectory": ""}), "trajectory schema version b''"),
    "no stage": (described(stage=None), "stage None does not go with the scores of ['teacher', 'base']"),
    "stage unknown": (described(stage="learned"), "stage b'learned'"),
    "stage generated with scores": (described(stage="generated"), "stage b'generated'"),
    "no models": (described(models=None), "stage b'scored' does not go with the scores of []"),
    "model without columns": (described(models="teacher,base,other"), "column 'other_logprobs' is missing"),
    "columns without model": (described(models="teacher"), "column 'base_version"),
    "first column missing": (ordered(*NAMES[1:]), "column 0 is 'prompt_id"),
    "reward missing": (ordered(*[name for name in NAMES if name != "reward"]), "column 12 is"),
    "scores missing": (
        ordered(*[name for name in NAMES if name != "teacher_logprobs"]),
        "'teacher_logprobs' is missing",
    ),
    "version of the weights missing": (
        ordered(*[name for name in NAMES if name != "base_version"]),
        "'base_version' is missing",
    ),
    "version of the weights as text": (replaced("base_version", ["1"] * 3, pa.string()), "of another type or width"),
    "version of the weights negative": (cell("teacher_version", 1, lambda _: -1), "teacher_version is negative"),
    "nothing but an id": (ordered("trajectory_id"), "column 1 is missing, expected 'prompt_id: int64'"),
    "columns in another order": (ordered(NAMES[1], NAMES[0], *NAMES[2:]), "column 0 is 'prompt_id"),
    "further column": (BATCH.append_column("note", pa.array(["a", "b", "c"])), "column 'note: string' is unknown"),
    "column twice": (BATCH.append_column("base_logprobs", BATCH["base_logprobs"]), "or there twice"),
    "ids as texts": (replaced("trajectory_id", ["7", "8", "9"], pa.string()), "column 0 is 'trajectory_id: string"),
    "ids of 32 bits": (replaced("trajectory_id", [7, 8, 9], pa.int32()), "column 0 is 'trajectory_id: int32"),
    "tokens of 64 bits": (
        replaced("token_ids", BATCH["token_ids"].cast(pa.list_(pa.int64()))),
        "column 8 is 'token_ids: list<item: int64>",
    ),
    "log-probabilities of 64 bits": (
        replaced("rollout_logprobs", BATCH["rollout_logprobs"].cast(pa.list_(pa.float64()))),
        "column 10 is",
    ),
    "large lists": (
        replaced("token_ids", BATCH["token_ids"].cast(pa.large_list(pa.int32()))),
        "column 8 is 'token_ids: large_list",
    ),
    "scores of 64 bits": (
        replaced("teacher_logprobs", BATCH["teacher_logprobs"].cast(pa.list_(pa.float64()))),
        "of another type or width",
    ),
    "candidates of another width": (
        replaced(
            "teacher_candidate_logprobs", [[[-1.0] * 3] * n for n in (3, 2, 3)], pa.list_(pa.list_(pa.float32(), 3))
        ),
        "of another type or width",
    ),
    "hidden states as texts": (
        replaced("base_hidden", [["a"] * n for n in (3, 2, 3)], pa.list_(pa.string())),
        "of another type or width",
    ),
    "null id": (replaced("prompt_id", [0, None, 0]), "column 'prompt_id' holds nulls"),
    "null row": (replaced("token_ids", [[1, 2, 3, 4, 5], None, [1, 2, 3, 4, 5]]), "column 'token_ids' holds nulls"),
    "null token": (cell("token_ids", 1, lambda ids: [None, *ids[1:]]), "column 'token_ids' holds nulls"),
    "null candidate": (
        cell("candidate_ids", 1, lambda ids: [[None, 1], *ids[1:]]),
        "column 'candidate_ids' holds nulls",
    ),
    "id negative": (cell("trajectory_id", 1, lambda _: -8), "trajectory -8: trajectory_id is negative"),
    "prompt negative": (cell("prompt_id", 1, lambda _: -1), "trajectory 8: prompt_id is negative"),
    "token negative": (cell("token_ids", 1, lambda ids: [-1, *ids[1:]]), "trajectory 8: a token id is negative"),
    "token too many": (
        cell("token_ids", 1, lambda ids: [*ids, 1]),
        "trajectory 8: loss_mask has 4 values for 5 tokens",
    ),
    "no tokens": (cell("token_ids", 1, lambda _: []), "trajectory 8: loss_mask has 4 values for 0 tokens"),
    "mask too short": (
        cell("loss_mask", 1, lambda mask: mask[1:]),
        "trajectory 8: loss_mask has 3 values for 4 tokens",
    ),
    "mask of 2": (
        cell("loss_mask", 1, lambda _: [0, 0, 1, 2]),
        "trajectory 8: loss_mask holds values other than 0 and 1",
    ),
    "mask from the first token": (
        cell("loss_mask", 1, lambda _: [1, 0, 0, 1]),
        "trajectory 8: the first token is marked",
    ),
    "mask that marks too many": (
        cell("loss_mask", 1, lambda _: [0, 1, 1, 1]),
        "trajectory 8: rollout_logprobs has 2 values for 3 completion tokens",
    ),
    "log-probability missing": (cell("rollout_logprobs", 1, lambda _: [-1.0]), "rollout_logprobs has 1 values for 2"),
    "log-probability NaN": (
        cell("rollout_logprobs", 1, lambda _: [NAN, -1.0]),
        "trajectory 8: rollout_logprobs holds NaN",
    ),
    "score infinite": (
        cell("teacher_logprobs", 2, lambda _: [-1.0, -INF, -1.0]),
        "trajectory 9: teacher_logprobs holds",
    ),
    "score missing": (
        cell("teacher_logprobs", 0, lambda row: row[1:]),
        "trajectory 7: teacher_logprobs has 2 values for 3",
    ),
    "candidate negative": (
        cell("candidate_ids", 1, lambda _: [[0, -1], [0, 1]]),
        "trajectory 8: a candidate id is negative",
    ),
    "candidates missing": (cell("candidate_ids", 1, lambda _: []), "trajectory 8: candidate_ids has 0 values for 2"),
    "candidate NaN": (
        cell("teacher_candidate_logprobs", 1, lambda _: [[NAN, -1.0], [-1.0, -1.0]]),
        "teacher_candidate_logprobs holds NaN",
    ),
    "entropy infinite": (cell("teacher_entropy", 1, lambda _: [INF, 0.0]), "trajectory 8: teacher_entropy holds NaN"),
    "hidden state missing": (
        cell("base_hidden", 1, lambda row: row[1:]),
        "trajectory 8: base_hidden has 1 values for 2",
    ),
    "reward NaN": (cell("reward", 0, lambda _: NAN), "trajectory 7: reward is NaN or infinity"),
    "finish unknown": (cell("finish_reason", 1, lambda _: "tired"), "trajectory 8: finish_reason is none of stop"),
    "versions fall": (cell("max_policy_version", 1, lambda _: -1), "trajectory 8: version_changes has 0 values"),
    "version negative": (cell("min_policy_version", 1, lambda _: -1), "trajectory 8: min_policy_version is negative"),
    "change missing": (cell("version_changes", 2, lambda _: []), "trajectory 9: version_changes has 0 values for"),
    "change beyond the end": (cell("version_changes", 2, lambda _: [3]), "trajectory 9: version_changes is [3]"),
    "change before the start": (cell("version_changes", 2, lambda _: [0]), "trajectory 9: version_changes is [0]"),
}
WRONG_BYTES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not an Arrow trajectory batch"),
    "text": (b"not arrow", "not an Arrow trajectory batch"),
    "zeros": (bytes(4096), "not an Arrow trajectory batch"),
    "ones": (b"\xff" * 4096, "not an Arrow trajectory batch"),
    "JSON": (b'{"trajectory_id": 1}', "not an Arrow trajectory batch"),
    "a pickle": (b"\x80\x05\x95\x10\x00\x00\x00\x00\x00\x00\x00", "not an Arrow trajectory batch"),
    "Arrow's file format": (as_file(), "not an Arrow trajectory batch"),
    "schema alone": (several(), "not an Arrow trajectory batch"),
    "huge metadata": (b"\xff\xff\xff\xff\xff\xff\xff\x7f" + WIRE[8:], "not an Arrow trajectory batch"),
    "first byte lost": (WIRE[1:], "not an Arrow trajectory batch"),
    "twice the schema": (WIRE[: WIRE.index(b"\xff\xff\xff\xff", 4)] * 2, "not an Arrow trajectory batch"),
}
# Every fraction of the bytes ends in another part of the format: lengths, schema, record batch, body.
CUTS = sorted({1, 3, 4, 7, 8, 9, 64, *(len(WIRE) * part // 24 for part in range(1, 24))})
