"""Scores by what an engine that generates lists of given tokens: each token's own log-probability, and the likeliest.

Such an engine computes whole distributions, and sends the log-probabilities of some tokens of each. What needs the
model's hidden states, or tokens that another model chose, is not to be had from it.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import FLOOR, Scores
from cluster.contracts.trajectory import Floats, Ints
from teacher_workers.backends.base import TeacherBackend

# Of sampled tokens: ids and log-probabilities in nats, [sampled_tokens, 1 + count]; each token's own, then the best.
Listed = tuple[Ints, Floats]
WORKS = "objective.support 'sampled' and 'topk' work, without the teacher's entropy"


class ListedLogprobsBackend(TeacherBackend):
    """Scores sampled tokens, and chooses the most likely ones; what lists them is the subclass's."""

    signals = frozenset({"logprobs", "candidate_ids", "candidate_logprobs"})
    reads_scorer_prompts = True
    scorer: ClassVar[str]  # in a refusal: what scores, and the verb

    def __init__(self, teacher: TeacherConfig) -> None:
        self._teacher = teacher

    @classmethod
    def fault(cls, teacher: TeacherConfig, request: ScoreRequest) -> str | None:
        if request.given_candidates:
            return f"{cls.scorer} no tokens that another model chose, which the objective needs; {WORKS}"
        missing = super().fault(teacher, request)
        return f"{missing}; {WORKS}" if missing else None

    async def listed(self, rows: Sequence[tuple[Ints, Ints]], count: int, newest: int) -> tuple[Listed, int]:
        """Return what is listed of rows, as token ids and sampled places, and the version of the weights.

        That is the same for all rows, and at least `newest`.
        """
        raise NotImplementedError

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics, int]:
        """Score all rows with one version of the weights, which is at least the newest that wrote any of them.

        A stop id of a class of several is the class: its log-probability is that of all members that the engine lists,
        which are the most likely tokens and the written one. So is the probability that excluded tokens leave.
        """
        token_ids, loss_mask = as_read_by(batch, request.model)
        rows = [(token_ids[row], np.flatnonzero(loss_mask[row]).astype(np.int32)) for row in range(len(token_ids))]
        newest = max(batch["max_policy_version"].to_pylist(), default=0)
        merged = self._teacher.stop_class if len(self._teacher.stop_class) > 1 else ()
        excluded = self._teacher.excluded_token_ids
        listed, version = await self.listed(rows, request.top_k + len(merged) + len(excluded), newest)
        logprobs, ids, of_candidates = columns(listed, merged, request.top_k, excluded)
        scores: dict[str, NDArray[Any]] = {"logprobs": logprobs}
        if request.top_k:
            scores |= {"candidate_ids": ids, "candidate_logprobs": of_candidates}
        return scores, {}, version


def columns(
    listed: Listed, stop_class: Sequence[int], top_k: int, excluded: Sequence[int] = ()
) -> tuple[Floats, Ints, Floats]:
    """Return logprobs [sampled_tokens], and ids and logprobs [sampled_tokens, top_k] of the most likely classes.

    Example:
        >>> listed = np.array([[5, 1, 4, 5]], np.int32), np.log(np.array([[0.2, 0.5, 0.3, 0.2]], np.float32))
        >>> own, ids, logprobs = columns(listed, (4, 5), 2)
        >>> np.exp(own).round(3).tolist(), ids.tolist(), np.exp(logprobs).round(3).tolist()
        ([0.5], [[1, 4]], [[0.5, 0.5]])
    """
    tokens, own, ids, logprobs = listed[0][:, :1], listed[1][:, 0], listed[0][:, 1:], listed[1][:, 1:]
    if excluded:
        is_excluded = np.isin(ids, excluded)
        left = np.log1p(-np.where(is_excluded, np.exp(logprobs), 0.0).sum(1))
        own, logprobs = own - left, np.where(is_excluded, -np.inf, logprobs - left[:, None])
    if stop_class:
        members, own_is_member = np.isin(ids, stop_class), np.isin(tokens[:, 0], stop_class)
        own_is_listed = (ids == tokens).any(1)
        mass = (
            np.where(members, np.exp(logprobs), 0.0).sum(1) + np.where(own_is_listed, 0.0, np.exp(own)) * own_is_member
        )
        with np.errstate(divide="ignore"):
            of_class = np.log(mass)
        own = np.where(own_is_member, of_class, own)
        is_first = members & (members.cumsum(1) == 1)
        logprobs = np.where(is_first, of_class[:, None], np.where(members, -np.inf, logprobs))
        ids = np.where(members, stop_class[0], ids)
    best = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(ids, best, 1), np.take_along_axis(logprobs, best, 1)
    return _clipped(own), chosen[0].astype(np.int32), _clipped(chosen[1])


def _clipped(logprobs: Floats) -> Floats:
    clipped: Floats = np.clip(logprobs, FLOOR, 0.0).astype(np.float32)
    return clipped
