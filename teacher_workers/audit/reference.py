"""Keeps a teacher's first answers to its probes in the run directory; later audits compare its replicas with them."""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa

from cluster.config.terms import TEACHER
from cluster.contracts.errors import CheckpointError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Ints, ragged
from teacher_workers.audit.checks import Answer

ORIGIN_KEY = b"preceptor.score_audit"


@dataclass(frozen=True)
class Origin:
    """Says which teacher answered which request."""

    model: str
    dtype: str
    quantization: str | None
    fingerprint: str  # identity that the backend gave it, on the driver's node
    request: ScoreRequest
    backend: str = "vllm"

    def is_same_teacher(self, other: "Origin") -> bool:
        """Tell whether the run file means the same model as then, though its files may differ."""
        names = ("backend", "model", "dtype", "quantization")
        return all(getattr(self, name) == getattr(other, name) for name in names)


@dataclass(frozen=True)
class Reference:
    """Holds the answers of one replica that passed its audit when the teacher began to serve the run."""

    origin: Origin
    answer: Answer

    @property
    def rows(self) -> list[Ints]:
        token_ids = ragged(self.answer.rows, "token_ids")
        return [token_ids[row] for row in range(len(token_ids))]

    def for_request(self, request: ScoreRequest) -> Answer:
        """Return the answer to another request: of a different one, the signals of every audit."""
        if request == self.origin.request:
            return self.answer
        shared = [f"{TEACHER}_logprobs", f"{TEACHER}_entropy"]
        text = ["token_ids", "loss_mask", "rollout_logprobs"]
        return Answer(self.answer.rows.select(text + shared), self.answer.perturbed.select(text + shared))


def save_reference(path: Path, reference: Reference) -> None:
    """Write a reference; the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, perturbed = reference.answer.rows, reference.answer.perturbed
    metadata = {**rows.schema.metadata, ORIGIN_KEY: msgspec.json.encode(reference.origin)}
    schema = rows.schema.with_metadata(metadata)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            for batch in (rows, perturbed):
                writer.write_batch(batch.replace_schema_metadata(metadata))
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_reference(path: Path) -> Reference | None:
    """Read what `save_reference` wrote; None where there is none. Raise CheckpointError for another file."""
    if not path.exists():
        return None
    try:
        reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
        origin = msgspec.json.decode(reader.schema.metadata[ORIGIN_KEY], type=Origin)
        return Reference(origin, Answer(reader.get_batch(0), reader.get_batch(1)))
    except (pa.ArrowException, KeyError, IndexError, TypeError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it to take a new reference") from error
