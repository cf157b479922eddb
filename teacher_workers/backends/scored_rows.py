"""Scores batches with an engine that scores rows, one request each, and sends records of their tokens."""

import asyncio
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import Dtype
from cluster.contracts.columns import Ragged
from cluster.contracts.errors import ScoreError, UniformError, WrongLengthError
from cluster.contracts.metrics import Mean, Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import Floats, Ints, num_candidates_of, ragged
from cluster.models.lm_head import HeadFacts
from cluster.models.token_scores import STATE_DTYPES, Layout, layout_of, scores_in
from teacher_workers.backends.base import TeacherBackend

UNIFORM_TOLERANCE = 1e-5  # nats; float32 log-probabilities near -12 are exact to 1e-6, no real text is this even


class ScoredRowsBackend(TeacherBackend, ABC):
    """Scores with an engine that reads a row and scores its tokens, as records of `cluster/models/token_scores.py`."""

    signals = frozenset({"logprobs", "candidate_ids", "candidate_logprobs", "entropy", "hidden"})
    reads_scorer_prompts = True

    def __init__(self, head: HeadFacts, state_dtype: Dtype, layers_width: int = 0) -> None:
        """Take the engine's head, the dtype of its hidden states, and how many values of other layers a token has."""
        self._head, self._state_dtype, self._layers_width = head, STATE_DTYPES[state_dtype], layers_width
        self.shared_ids: Ints | None = None  # tokens that a student of another tokenizer has too; None: all are
        self._num_requests = 0

    @abstractmethod
    async def score_row(
        self, request_id: str, token_ids: Ints, positions: Ints, ids: Ints, layout: Layout
    ) -> tuple[NDArray[np.uint8], int]:
        """Return the records [n, bytes] of a row, and how many of its positions the engine had cached.

        The `positions` [n], ascending, at least one, predict the sampled tokens; `ids` [n, 1 + given] are these and the
        other tokens that are to be scored.
        """

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        """Score all rows; the engine decides how many run together, and with rows of which batches.

        Raises:
            ScoreError: records are missing (WrongLengthError), all scores are alike (UniformError), or the batch lacks
                the candidates that are to be scored.
        """
        num_candidates = num_candidates_of(batch)
        if request.given_candidates and not num_candidates:
            raise ScoreError(f"{request.model} is to score candidates, but the batch has none")
        layout = layout_of(request, num_candidates, self.shared_ids is not None)
        sampled = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
        ids = sampled[:, None]
        if layout.num_given:
            ids = np.concatenate([ids, ragged(batch, "candidate_ids").values], axis=1)
        rows = as_read_by(batch, request.model)
        records, num_cached = await self._score_rows(batch, rows, ids, layout)
        scores = scores_in(records)
        logprobs = scores["logprobs"]
        if self._head.stop_class:  # which is likelier than one token
            logprobs = logprobs[~np.isin(sampled, self._head.stop_class)]
        refuse_uniform(logprobs, self._head.vocabulary_size - len(self._head.excluded_ids))
        metrics = {f"{request.model}/prefix_hit_ratio": Mean(float(num_cached), float(len(rows[0].values)))}
        if layout.shared_mass:
            mass = scores.pop("shared_mass")
            metrics[f"{request.model}/teacher_shared_mass"] = Mean(float(mass.sum(dtype=np.float64)), float(len(mass)))
        return scores, metrics

    async def _score_rows(
        self, batch: pa.RecordBatch, read: tuple[Ragged, Ragged], ids: Ints, layout: Layout
    ) -> tuple[NDArray[Any], int]:
        """Return the records [sampled_tokens] of all rows, and the number of cached positions."""
        token_ids, loss_mask = read
        offsets = ragged(batch, "rollout_logprobs").offsets
        number, self._num_requests = self._num_requests, self._num_requests + len(token_ids)
        # A row without a context has no sampled token: nothing is learned of it.
        rows = [row for row in range(len(token_ids)) if offsets[row] < offsets[row + 1]]
        answers = await asyncio.gather(
            *(
                self.score_row(
                    str(number + row),
                    token_ids[row],
                    (np.flatnonzero(loss_mask[row]) - 1).astype(np.int32),
                    ids[offsets[row] : offsets[row + 1]],
                    layout,
                )
                for row in rows
            )
        )
        dtype = layout.dtype(self._state_dtype, self._head.width, self._layers_width)
        # The batch's total is not enough: a row that lacks one beside a row with one too many would shift what lies
        # between.
        for row, (records, _) in zip(rows, answers, strict=True):
            needed = (offsets[row + 1] - offsets[row], dtype.itemsize)
            if records.shape != needed:
                raise WrongLengthError(
                    f"trajectory {batch['trajectory_id'][row].as_py()}: the engine returned records of shape "
                    f"{list(records.shape)}, its completion tokens need {list(map(int, needed))}"
                )
        whole = np.concatenate([np.empty((0, dtype.itemsize), np.uint8), *(records for records, _ in answers)])
        return whole.reshape(-1).view(dtype), sum(cached for _, cached in answers)


def refuse_uniform(logprobs: Floats, vocabulary_size: int) -> None:
    """Refuse several tokens that were all scored -log(vocabulary size): the model's weights are not loaded."""
    uniform = -math.log(vocabulary_size)
    if len(logprobs) > 1 and (np.abs(logprobs - uniform) <= UNIFORM_TOLERANCE).all():
        raise UniformError(
            f"all {len(logprobs)} tokens were scored {uniform:.4f}, as if every token of the vocabulary were equally "
            "likely; the teacher's weights are missing or damaged"
        )
