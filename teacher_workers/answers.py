"""What a replica answered to an audit's probes, and how far two answers are apart, in tolerances."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.contracts.interfaces import ScoreRequest
from cluster.contracts.objective import TEACHER
from cluster.contracts.trajectory import ragged

FLOOR_NATS = -20.0  # below it, scores of one model in two batches differ most, and training least


@dataclass(frozen=True)
class Tolerance:
    """By how much two answers of the same weights may differ, as a mean over tokens."""

    nats: float
    hidden: float  # of a hidden state: length of the difference / length


@dataclass(frozen=True)
class Answer:
    """What one replica said of the probes: both batches, scored."""

    rows: pa.RecordBatch
    twins: pa.RecordBatch


def columns_of(request: ScoreRequest) -> list[str]:
    """Return the columns that the answer to a request must have."""
    columns = {
        "candidate_ids": bool(request.top_k),
        f"{request.model}_logprobs": True,
        f"{request.model}_candidate_logprobs": bool(request.top_k) or request.given_candidates,
        f"{request.model}_entropy": request.entropy,
        f"{request.model}_hidden": request.hidden,
    }
    return [name for name, is_asked in columns.items() if is_asked]


def differences(first: pa.RecordBatch, second: pa.RecordBatch, tolerance: Tolerance) -> tuple[NDArray[Any], ...]:
    """Return by how many tolerances two answers to rows of the same lengths differ, per scored token of all rows.

    Returns:
        Of the written tokens' scores, and of what was said of the position besides (columns that only one answer has
        are left out): two arrays [scored_tokens].
    """
    written = _nats(first, second, "logprobs") / tolerance.nats
    shared = set(first.schema.names) & set(second.schema.names)
    others = [np.zeros(len(written))]
    for name in ("entropy", "candidate_logprobs"):
        if f"{TEACHER}_{name}" in shared:
            others.append(_nats(first, second, name) / tolerance.nats)
    if f"{TEACHER}_hidden" in shared:
        left, right = (column(answer, "hidden") for answer in (first, second))
        lengths = np.maximum(np.linalg.norm(left, axis=-1), 1e-9)
        others.append(np.linalg.norm(left - right, axis=-1) / lengths / tolerance.hidden)
    return written, np.max(others, axis=0)


def gap(first: Answer, second: Answer, tolerance: Tolerance) -> float:
    """Return the mean difference between two answers to the same probes in tolerances: above 1, they disagree."""
    pairs = [differences(first.rows, second.rows, tolerance), differences(first.twins, second.twins, tolerance)]
    return max(float(np.concatenate(column).mean()) for column in zip(*pairs, strict=True))


def column(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """Return the teacher's column in float32; uint16 stands for bfloat16's bits, float32's upper half."""
    values = ragged(batch, f"{TEACHER}_{name}").values
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def written_tokens(batch: pa.RecordBatch) -> NDArray[Any]:
    """Return the tokens that were scored, of all rows."""
    return ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]


def _nats(first: pa.RecordBatch, second: pa.RecordBatch, name: str) -> NDArray[Any]:
    """Return [tokens]: the absolute difference of a column in nats, averaged over candidates."""
    left, right = (np.maximum(column(answer, name), FLOOR_NATS) for answer in (first, second))
    found: NDArray[Any] = np.abs(left - right)
    return found if found.ndim == 1 else found.mean(axis=1)
