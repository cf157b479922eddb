"""Scores with a teacher of another tokenizer: `[teachers.NAME] tokenizer = "aligned"`.

Another backend runs the teacher. It gets its own prompt and the completion in its own tokens, and scores those that
cover the same bytes as one token of the student (`cluster/models/alignment.py`); the scores go back to the places of
the student's tokens.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from msgspec.structs import replace as with_fields
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import Mean, Metrics, Sum
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import GeneratedTrajectory, Ints, make_generated, num_candidates_of, ragged
from cluster.models.alignment import ABSENT, Alignment, TokenMap, load_token_map
from teacher_workers.backends.base import FLOOR, TeacherBackend, find_backend
from teacher_workers.backends.lm_head_scores import HiddenStatesBackend

if TYPE_CHECKING:
    from cluster.models.model_checks import ModelFacts

MIN_JUDGED_TOKENS = 1000  # of the student, before their coverage is held against the least


class AlignedBackend(TeacherBackend):
    """Translates rows for the teacher's own backend, and its scores back.

    A request that is not `aligned` is passed on as it is: its token ids are the teacher's own, as an audit's are.
    """

    signals = frozenset({"logprobs", "candidate_logprobs", "entropy", "aligned", "shared"})
    reads_scorer_prompts = True

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Read both tokenizers and start the teacher's backend."""
        self._map = load_token_map(teacher)
        self._min_coverage, self._max_tokens = teacher.min_coverage, max_model_len - 1
        self._num_tokens = self._num_strict = 0
        self._inner: TeacherBackend = find_backend(_without_alignment(teacher))(
            _without_alignment(teacher), max_model_len, sleeps
        )
        if isinstance(self._inner, HiddenStatesBackend):
            self._inner.shared_ids = torch.from_numpy(self._map.shared_ids)

    @classmethod
    def fault(cls, teacher: TeacherConfig, request: ScoreRequest) -> str | None:
        if request.top_k or request.hidden or request.further:
            return 'tokenizer = "aligned" scores the student\'s tokens alone; use objective.support "student_topk"'
        inner = _without_alignment(teacher)
        return find_backend(inner).fault(inner, replace(request, aligned=False))

    @classmethod
    def check(cls, teacher: TeacherConfig, student: "ModelFacts") -> "ModelFacts":
        inner = _without_alignment(teacher)
        return find_backend(inner).check(inner, student)

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        """Return the teacher's own fingerprint and that of the token map, so that the ledger has both."""
        inner = _without_alignment(teacher)
        digest = teacher.alignment.digest if teacher.alignment else ""
        return f"{find_backend(inner).identity(inner)}+{digest}"

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        """Score the strict positions; elsewhere `aligned` is 0 and the scores are FLOOR.

        Raises:
            ScoreError: as the teacher's backend does, or fewer of the student's tokens than `min_coverage` are strict.
        """
        if not request.aligned:
            return await self._inner.score(batch, request)
        rows = await asyncio.to_thread(translate, batch, self._map, request.model, self._max_tokens)
        self._check_coverage(rows)
        scores: Scores = {}
        metrics: Metrics = {}
        if rows.batch is not None:
            scores, metrics = await self._inner.score(rows.batch, replace(request, aligned=False))
        return place(rows, scores, request), {**metrics, **_metrics(rows, request.model)}

    @property
    def is_dead(self) -> bool:
        return self._inner.is_dead

    async def sleep(self) -> None:
        await self._inner.sleep()

    async def wake(self) -> None:
        await self._inner.wake()

    async def shutdown(self) -> None:
        await self._inner.shutdown()

    def _check_coverage(self, rows: "TranslatedRows") -> None:
        self._num_tokens += rows.num_tokens
        self._num_strict += len(rows.places)
        coverage = self._num_strict / max(1, self._num_tokens)
        if self._num_tokens >= MIN_JUDGED_TOKENS and coverage < self._min_coverage:
            raise ScoreError(
                f"{coverage:.1%} of the student's tokens cover the same text as one of the teacher's, and "
                f"min_coverage = {self._min_coverage}; take a teacher whose tokenizer is closer, or lower it"
            )


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


def _metrics(rows: TranslatedRows, model: str) -> Mapping[str, Any]:
    num_tokens = float(rows.num_tokens)
    return {
        f"{model}/coverage": Mean(float(len(rows.places)), num_tokens),
        # Sampled tokens are draws of the student, so that the share that are the teacher's too estimates their mass.
        f"{model}/student_shared_mass": Mean(float(rows.num_known), num_tokens),
        f"{model}/dropped_rows": Sum(float(rows.num_dropped)),
    }


def _without_alignment(teacher: TeacherConfig) -> TeacherConfig:
    return with_fields(teacher, tokenizer=None, alignment=None)
