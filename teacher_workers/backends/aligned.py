"""Scores with a teacher of another tokenizer: `[teachers.NAME] tokenizer = "aligned"`.

Another backend runs the teacher. It gets its own prompt and the completion in its own tokens, and scores those that
cover the same bytes as one token of the student (`cluster/models/alignment.py`); the scores go back to the places of
the student's tokens.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from msgspec.structs import replace as with_fields

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ScoreError
from cluster.contracts.metrics import Mean, Metrics, Sum
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import Scores
from cluster.models.alignment import load_token_map
from teacher_workers.backends.base import Answer, TeacherBackend, find_backend
from teacher_workers.backends.scored_rows import ScoredRowsBackend
from teacher_workers.translation import TranslatedRows, place, translate

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
        if isinstance(self._inner, ScoredRowsBackend):
            self._inner.shared_ids = self._map.shared_ids.astype(np.int32)

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

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> Answer:
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
            scores, metrics, *_ = await self._inner.score(rows.batch, replace(request, aligned=False))
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

    def _check_coverage(self, rows: TranslatedRows) -> None:
        self._num_tokens += rows.num_tokens
        self._num_strict += len(rows.places)
        coverage = self._num_strict / max(1, self._num_tokens)
        if self._num_tokens >= MIN_JUDGED_TOKENS and coverage < self._min_coverage:
            raise ScoreError(
                f"{coverage:.1%} of the student's tokens cover the same text as one of the teacher's, and "
                f"min_coverage = {self._min_coverage}; take a teacher whose tokenizer is closer, or lower it"
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
