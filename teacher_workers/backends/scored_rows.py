"""Scores batches with an engine that scores positions of rows, and sends one record of each."""

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

    @abstractmethod
    async def score_rows(self, token_ids: Ragged, positions: Ragged, ids: Ints, layout: Layout) -> tuple[Ragged, int]:
        """Return each row's records [n, bytes], and how many positions of all rows the engine had cached.

        The `positions` [n] of a row, ascending, at least one, predict its sampled tokens; `ids` [positions of all rows,
        1 + given] are these and the other tokens that are to be scored.
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
        token_ids, loss_mask = as_read_by(batch, request.model)
        records, num_cached = await self._records(batch, token_ids, positions_before(loss_mask), ids, layout)
        scores = scores_in(records)
        logprobs = scores["logprobs"]
        if self._head.stop_class:  # which is likelier than one token
            logprobs = logprobs[~np.isin(sampled, self._head.stop_class)]
        refuse_uniform(logprobs, self._head.vocabulary_size - len(self._head.excluded_ids))
        metrics = {f"{request.model}/prefix_hit_ratio": Mean(float(num_cached), float(len(token_ids.values)))}
        if layout.shared_mass:
            mass = scores.pop("shared_mass")
            metrics[f"{request.model}/teacher_shared_mass"] = Mean(float(mass.sum(dtype=np.float64)), float(len(mass)))
        return scores, metrics

    async def _records(
        self, batch: pa.RecordBatch, token_ids: Ragged, positions: Ragged, ids: Ints, layout: Layout
    ) -> tuple[NDArray[Any], int]:
        """Return the records [sampled_tokens] of all rows, and the number of cached positions."""
        dtype = layout.dtype(self._state_dtype, self._head.width, self._layers_width)
        # A row without a context has no sampled token: nothing is learned of it.
        rows = np.flatnonzero(positions.lengths)
        if not len(rows):
            return np.empty(0, dtype), 0
        records, num_cached = await self.score_rows(*only_rows(rows, token_ids, positions), ids, layout)
        # The batch's total is not enough: a row that lacks one beside a row with one too many would shift what lies
        # between.
        size = records.values.shape[1]
        is_wrong = (records.lengths != positions.lengths[rows]) | (size != dtype.itemsize)
        if is_wrong.any():
            first = int(is_wrong.argmax())
            raise WrongLengthError(
                f"trajectory {batch['trajectory_id'][rows[first]].as_py()}: the engine returned records of shape "
                f"{[int(records.lengths[first]), size]}, its completion tokens need "
                f"{[int(positions.lengths[rows[first]]), dtype.itemsize]}"
            )
        return records.values.reshape(-1).view(dtype), num_cached


def positions_before(loss_mask: Ragged) -> Ragged:
    """Return the positions, from the start of each row, that predict the sampled tokens.

    Example:
        >>> mask = Ragged(np.array([0, 1, 1, 0, 0, 1], np.uint8), np.array([0, 3, 6]))
        >>> [positions_before(mask)[row].tolist() for row in range(2)]
        [[0, 1], [1]]
    """
    places = np.flatnonzero(loss_mask.values)
    offsets = np.searchsorted(places, loss_mask.offsets)
    starts = np.repeat(loss_mask.offsets[:-1], np.diff(offsets))
    return Ragged((places - starts - 1).astype(np.int32), offsets)


def only_rows(rows: NDArray[np.int64], token_ids: Ragged, positions: Ragged) -> tuple[Ragged, Ragged]:
    """Return some rows of both columns, in their order; where they are all, the columns themselves."""
    return (token_ids, positions) if len(rows) == len(token_ids) else (_some(rows, token_ids), _some(rows, positions))


def _some(rows: NDArray[np.int64], column: Ragged) -> Ragged:
    return Ragged(np.concatenate([column[row] for row in rows.tolist()]), np.cumsum([0, *column.lengths[rows]]))


def refuse_uniform(logprobs: Floats, vocabulary_size: int) -> None:
    """Refuse several tokens that were all scored -log(vocabulary size): the model's weights are not loaded."""
    uniform = -math.log(vocabulary_size)
    if len(logprobs) > 1 and (np.abs(logprobs - uniform) <= UNIFORM_TOLERANCE).all():
        raise UniformError(
            f"all {len(logprobs)} tokens were scored {uniform:.4f}, as if every token of the vocabulary were equally "
            "likely; the teacher's weights are missing or damaged"
        )
