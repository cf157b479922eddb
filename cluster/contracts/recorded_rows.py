"""Defines the rows that a run with `rollout.record` persists: all that it learned from, as Arrow files in a folder.

A step has one file, or one for each schema where teachers differ in theirs, called after the step and its content:
`step-00000012-CHECKSUM.arrow`. Each Arrow batch in it is a batch as it went to the learner, in the order of arrival,
with all columns of a scored trajectory (`trajectory.py`) and these behind them:

| column | meaning |
|---|---|
| `step` | that learned from the row, from 1 |
| `batch`, `row` | place of its batch among the step's, in the order of arrival, and its place in there, from 0 |
| `completion_tokens` | how many it has |
| `log_ratio` | mean over them of sampler minus teacher log-probability, in nats; null without any |

Any Arrow reader reads them: `pyarrow.dataset.dataset("runs/x/rows", format="arrow")`.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from cluster.contracts.arrow_files import write_arrow
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.contracts.row_filter import parse_filter
from cluster.contracts.trajectory import models_in, ragged

VERSION = "1"
METADATA = b"preceptor.recorded_rows"
CHECKSUM_DIGITS = 16
OWN_COLUMNS = ("step", "batch", "row", "completion_tokens", "log_ratio")
TEACHER_LOGPROBS = "teacher_logprobs"


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says, in a file's metadata, where its rows come from."""

    version: str  # of this format
    step: int
    step_rows: int  # of the step, in all of its files
    prompts: str  # checksum of the run's prompts, whose ids the rows have
    scored_by: dict[str, str]  # [teachers.NAME] -> fingerprint of its checkpoint
    teacher_versions: dict[str, int]  # [teachers.NAME] -> version of its weights, of self-teachers


class RecordedBatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds a batch that a step learned from, as its wire bytes decode, and what the driver knows of it."""

    rows: pa.RecordBatch
    scored_by: dict[str, str]
    teacher_versions: dict[str, int]


class RecordedRows:
    """Holds the files of one run in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> Mapping[int, list[Path]]:
        """Return the files by their steps, in order."""
        of_steps: dict[int, list[Path]] = defaultdict(list)
        for path in sorted(self.folder.glob("step-*-*.arrow")) if self.folder.is_dir() else ():
            step = path.stem.split("-")[1]
            if step.isdecimal():
                of_steps[int(step)].append(path)
        return of_steps

    def write(self, step: int, batches: Sequence[RecordedBatch], prompts: str) -> int:
        """Write the batches of a step, in the order in which they came, and return their bytes on disk."""
        num_rows, num_bytes = sum(batch.rows.num_rows for batch in batches), 0
        for numbers in _of_one_file(batches):
            first = batches[numbers[0]]
            origin = Origin(VERSION, step, num_rows, prompts, first.scored_by, first.teacher_versions)
            rows = [_with_own_columns(batches[number].rows, step, number) for number in numbers]
            path = self.folder / f"step-{step:08d}-{numbers[0]}.unnamed"
            metadata = {METADATA: msgspec.json.encode(origin)}
            num_bytes += write_arrow(path, rows, rows[0].schema, metadata, syncs=True)
            path.replace(self.folder / f"step-{step:08d}-{checksum_of(path)}.arrow")
        return num_bytes

    def drop_from(self, step: int) -> None:
        """Forget `step` and what followed: a resumed run does those steps again."""
        for written, paths in self.files().items():
            for path in paths if written >= step else ():
                path.unlink(missing_ok=True)

    def table(self, columns: Sequence[str], where: str | None = None) -> pa.Table:
        """Read columns of all rows for which a condition holds, with the errors of `Rows`."""
        return Rows([path for paths in self.files().values() for path in paths]).read(columns, where)


class Rows:
    """Reads rows of Arrow files that may lack some of each other's columns, whose values are null there."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Open the files; raise CheckpointError if there are none, or one is damaged."""
        if not paths:
            raise CheckpointError("no rows are recorded there; train with rollout.record = true")
        with _as_damage(paths[0].parent):
            schemas = [ds.dataset(str(path), format="arrow").schema for path in paths]
            self.schema = pa.unify_schemas(schemas).remove_metadata()
            self._rows = ds.dataset([str(path) for path in paths], schema=self.schema, format="arrow")
        self._folder = paths[0].parent

    def count(self, where: str | None = None) -> int:
        with self._explained(where) as condition:
            return int(self._rows.count_rows(filter=condition))

    def read(self, columns: Sequence[str] | None = None, where: str | None = None, most: int | None = None) -> pa.Table:
        """Return columns of the first rows for which a condition holds, as `parse_filter` takes it.

        Raises:
            ConfigError: the condition is none, or does not fit the columns, or a column is not there.
            CheckpointError: a file is damaged.
        """
        if missing := [name for name in columns or () if name not in self.schema.names]:
            raise ConfigError(f"there is no column '{missing[0]}'; there are {', '.join(self.schema.names)}")
        names = None if columns is None else list(columns)
        with self._explained(where) as condition:
            if most is None:
                return self._rows.to_table(columns=names, filter=condition)
            return self._rows.head(most, columns=names, filter=condition)

    @contextmanager
    def _explained(self, where: str | None) -> Iterator[pc.Expression | None]:
        """Give the condition as an expression, and say what is wrong if it does not fit the columns."""
        condition = None if where is None else parse_filter(where)
        try:
            with _as_damage(self._folder):
                yield condition
        except CheckpointError as error:
            if condition is None or not isinstance(error.__cause__, pa.ArrowInvalid | pa.ArrowNotImplementedError):
                raise
            fault = str(error.__cause__).splitlines()[0]
            raise ConfigError(f"condition '{where}': {fault}; there are {', '.join(self.schema.names)}") from error


@contextmanager
def _as_damage(folder: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(f"{folder}: its rows cannot be read: {error}; restore the files") from error


def open_recorded(path: Path, check: bool = False) -> tuple[Origin, pa.RecordBatchFileReader]:
    """Open one file; with `check`, compare its content with the checksum in its name.

    Raises:
        CheckpointError: it is damaged, or of another release.
    """
    try:
        if check and checksum_of(path) not in path.stem:
            raise CheckpointError(f"{path}: its content is not what its name says; restore the file")
        reader = pa.ipc.open_file(pa.memory_map(str(path)), options=pa.ipc.IpcReadOptions(use_threads=False))
        origin = msgspec.json.decode((reader.schema.metadata or {})[METADATA], type=Origin)
    except (pa.ArrowException, OSError, KeyError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path}: no recorded rows: {error}; restore the file") from error
    if origin.version != VERSION:
        raise CheckpointError(f"{path}: recorded rows of version {origin.version!r}, expected {VERSION}; record anew")
    return origin, reader


def as_trajectories(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the batch as it went to the learner, without the columns that the record adds."""
    columns = batch.select([name for name in batch.schema.names if name not in OWN_COLUMNS])
    metadata = {key: value for key, value in (batch.schema.metadata or {}).items() if key != METADATA}
    return columns.replace_schema_metadata(metadata)


def checksum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:CHECKSUM_DIGITS]


def _of_one_file(batches: Sequence[RecordedBatch]) -> Iterable[list[int]]:
    """Return the numbers of batches that go into one file: those of one schema, scored by the same models."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, batch in enumerate(batches):
        origin = msgspec.json.encode([batch.scored_by, batch.teacher_versions]).decode()
        groups[batch.rows.schema.to_string(show_schema_metadata=True), origin].append(number)
    return groups.values()


def _with_own_columns(rows: pa.RecordBatch, step: int, number: int) -> pa.RecordBatch:
    counts = ragged(rows, "rollout_logprobs").lengths
    values = {
        "step": pa.array(np.full(rows.num_rows, step, np.int32)),
        "batch": pa.array(np.full(rows.num_rows, number, np.int32)),
        "row": pa.array(np.arange(rows.num_rows, dtype=np.int32)),
        "completion_tokens": pa.array(counts.astype(np.int32)),
        "log_ratio": pa.array(list(log_ratios(rows)), pa.float32()),
    }
    for name, column in values.items():
        rows = rows.append_column(name, column)
    return rows


def log_ratios(rows: pa.RecordBatch) -> Iterator[float | None]:
    """Yield each row's mean of sampler minus teacher log-probability; None without tokens or teacher."""
    logprobs = ragged(rows, "rollout_logprobs")
    is_scored = "teacher" in models_in(rows.schema)
    gaps = logprobs.values - ragged(rows, TEACHER_LOGPROBS).values if is_scored else logprobs.values
    for first, last in zip(logprobs.offsets, logprobs.offsets[1:], strict=False):
        yield float(gaps[first:last].mean(dtype=np.float64)) if is_scored and last > first else None
