"""Writes a batch's rows in the tokens of a teacher with its own tokenizer, and puts its scores where they belong."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.contracts.errors import ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import FLOOR, Scores
from cluster.contracts.trajectory import GeneratedTrajectory, Ints, make_generated, num_candidates_of, ragged
from cluster.models.alignment import ABSENT, Alignment, TokenMap


@dataclass(frozen=True)
class TranslatedRows:
    """Holds a batch in the teacher's tokens, and where its scores belong."""

    batch: pa.RecordBatch | None  # rows with strict positions, which alone have loss_mask 1; None: there are none
    places: NDArray[np.int64]  # [strict] among the student's completion tokens of all rows
    num_tokens: int  # of those
    num_known: int  # of those that are tokens of the teacher, wherever they stand
    num_dropped: int  # rows that the teacher's tokenizer would change
    shared: NDArray[np.bool_]  # [strict, k] which candidates are tokens of the teacher


def translate(batch: pa.RecordBatch, tokens: TokenMap, model: str, max_tokens: int) -> TranslatedRows:
    """Write each row's completion in the teacher's tokens, behind the teacher's prompt; rows end at `max_tokens`."""
    offsets = ragged(batch, "rollout_logprobs").offsets
    token_ids, loss_mask = as_read_by(batch, model)
    num_candidates = num_candidates_of(batch)
    candidates = ragged(batch, "candidate_ids").values if num_candidates else np.empty((int(offsets[-1]), 0), np.int32)
    mapped = tokens.to_teacher(candidates)
    rows, places, num_dropped = [], [np.empty(0, np.int64)], 0
    for row in range(batch.num_rows):
        sampled = np.flatnonzero(loss_mask[row])
        if not len(sampled):
            continue
        if sampled[-1] - sampled[0] >= len(sampled):
            raise ScoreError("a row has several completions; tokenizer = 'aligned' takes one per prompt")
        prompt, completion = token_ids[row][: sampled[0]], token_ids[row][sampled]
        aligned = tokens.align(completion)
        if aligned is None:
            num_dropped += 1
            continue
        aligned = _cut(aligned, max_tokens - len(prompt))
        strict = offsets[row] + aligned.student_positions
        if len(strict):
            rows.append(_row(row, prompt, aligned, mapped[strict] if num_candidates else None))
            places.append(strict)
    placed = np.concatenate(places)
    of_student = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
    return TranslatedRows(
        batch=make_generated(rows) if rows else None,
        places=placed,
        num_tokens=int(offsets[-1]),
        num_known=int((tokens.to_teacher(of_student) != ABSENT).sum()),
        num_dropped=num_dropped,
        shared=mapped[placed] != ABSENT,
    )


def place(rows: TranslatedRows, scores: Scores, request: ScoreRequest) -> dict[str, NDArray[Any]]:
    """Return the scores of all of the student's completion tokens; of those that are not strict, FLOOR."""
    placed: dict[str, NDArray[Any]] = {"aligned": np.zeros(rows.num_tokens, np.uint8)}
    placed["aligned"][rows.places] = 1
    for name in request.signals - {"aligned", "shared"}:
        shape = (rows.num_tokens, *rows.shared.shape[1:]) if name == "candidate_logprobs" else (rows.num_tokens,)
        placed[name] = np.full(shape, FLOOR, np.float32)
        if len(rows.places):
            placed[name][rows.places] = scores[name]
    if request.given_candidates:
        placed["shared"] = np.zeros((rows.num_tokens, rows.shared.shape[1]), np.uint8)
        placed["shared"][rows.places] = rows.shared
        placed["candidate_logprobs"][placed["shared"] == 0] = FLOOR
    return placed


def _cut(aligned: Alignment, max_tokens: int) -> Alignment:
    keep = aligned.teacher_positions < max_tokens
    return Alignment(
        aligned.token_ids[: max(0, max_tokens)], aligned.student_positions[keep], aligned.teacher_positions[keep]
    )


def _row(row: int, prompt: Ints, aligned: Alignment, mapped: Ints | None) -> GeneratedTrajectory:
    mask = np.zeros(len(prompt) + len(aligned.token_ids), np.uint8)
    mask[len(prompt) + aligned.teacher_positions] = 1
    known = None if mapped is None else np.where(mapped == ABSENT, 0, mapped).astype(np.int32)
    return GeneratedTrajectory(
        trajectory_id=row,
        prompt_id=row,
        sample_index=0,
        teacher="",
        domain="",
        min_policy_version=0,
        max_policy_version=0,
        token_ids=np.concatenate([prompt, aligned.token_ids]).astype(np.int32),
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(aligned.student_positions), np.float32),
        finish_reason="stop",
        reward=None,
        candidate_ids=known,
        candidate_rollout_logprobs=None if known is None else np.zeros(known.shape, np.float32),
    )
