"""A teacher's first answers to its probes, kept in the run directory: what later audits hold its replicas against."""

import os
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
from transformers.utils.hub import cached_file

from cluster.config.objective import TEACHER
from cluster.contracts.errors import CheckpointError, ModelError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Ints, ragged
from cluster.weight_sync.manifest import new_digest
from teacher_workers.audit.checks import Answer

ORIGIN_KEY = b"preceptor.score_audit"
SAMPLED_PLACES = 64  # of each file, evenly spaced; its header is the first
SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Origin:
    """Who gave the answers, and to what."""

    model: str
    dtype: str
    quantization: str | None
    fingerprint: str  # of the model's files, as the driver's node sees them
    request: ScoreRequest

    def is_same_teacher(self, other: "Origin") -> bool:
        """Tell whether the run file means the same model as then, whatever its files hold."""
        return (self.model, self.dtype, self.quantization) == (other.model, other.dtype, other.quantization)


@dataclass(frozen=True)
class Reference:
    """The answers of one replica that passed its audit when the teacher began to serve the run."""

    origin: Origin
    answer: Answer

    @property
    def rows(self) -> list[Ints]:
        """Return the tokens of each row."""
        token_ids = ragged(self.answer.rows, "token_ids")
        return [token_ids[row] for row in range(len(token_ids))]

    def for_request(self, request: ScoreRequest) -> Answer:
        """Return what it says about another request: of a different one, what every request of an audit asks for."""
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
    """Read a reference; None where there is none.

    Raises:
        CheckpointError: the file is not one that `save_reference` wrote.
    """
    if not path.exists():
        return None
    try:
        reader = pa.ipc.open_file(pa.py_buffer(path.read_bytes()))
        origin = msgspec.json.decode(reader.schema.metadata[ORIGIN_KEY], type=Origin)
        return Reference(origin, Answer(reader.get_batch(0), reader.get_batch(1)))
    except (pa.ArrowException, KeyError, IndexError, TypeError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); delete it to take a new reference") from error


def fingerprint(model: str) -> str:
    """Return a digest of the model's configuration and weights: names, sizes, headers, and samples of their bytes.

    It reads at most a quarter of a megabyte per file, so it costs little whatever the model's size; another training
    run's weights differ everywhere, so samples show them.

    Raises:
        ModelError: the model has no configuration here.
    """
    try:
        folder = Path(cached_file(model, "config.json")).parent
    except OSError as error:
        raise ModelError(f"model '{model}': found no config.json to tell it from others by: {error}") from error
    digest = new_digest()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.index.json")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(SAMPLED_PLACES):
                file.seek(size * place // SAMPLED_PLACES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
