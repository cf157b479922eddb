"""Scores in the rollout pool's engines: `[teachers.NAME] from = "student", refresh = "live", backend = "rollout"`.

Such a teacher has the weights that the student writes with, so it needs no engine, no GPU and no weights of its own.
Its workers send rows to the rollout actors, whose engines read them beside what they write.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import TeacherConfig
from cluster.contracts.errors import ActorDiedError, ScoreError
from cluster.contracts.metrics import Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import FLOOR, Scores
from cluster.contracts.trajectory import Floats, Ints
from cluster.models.weight_files import fingerprint
from teacher_workers.backends.base import TeacherBackend

if TYPE_CHECKING:
    from cluster.models.model_checks import ModelFacts

ROLLOUT_ACTORS = re.compile(r"rollout-\d+(-again-\d+)?")  # as the rollout pool calls them
LISTING_SECONDS = 5.0  # between two lists of the actors that there are
WAIT_SECONDS = 0.2  # for an engine with new enough weights
# Of sampled tokens: ids and log-probabilities in nats, [sampled_tokens, 1 + count]; each token's own, then the best.
Listed = tuple[Ints, Floats]
WORKS = "objective.support 'sampled' and 'topk' work, without the teacher's entropy"


class RolloutEnginesBackend(TeacherBackend):
    """Sends each batch to the rollout actor that has the fewest of its tokens to score."""

    signals = frozenset({"logprobs", "candidate_ids", "candidate_logprobs"})
    reads_scorer_prompts = True

    def __init__(self, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> None:
        """Prepare to ask; actors are looked for when they are needed."""
        self._teacher = teacher
        self._actors: dict[str, Any] = {}
        self._listed_at = -LISTING_SECONDS
        self._loads: Counter[str] = Counter()  # tokens under way, by actor

    @classmethod
    def fault(cls, teacher: TeacherConfig, request: ScoreRequest) -> str | None:
        if request.given_candidates:
            return f"the rollout engines score no tokens that another model chose, which the objective needs; {WORKS}"
        missing = super().fault(teacher, request)
        return f"{missing}; {WORKS}" if missing else None

    @classmethod
    def check(cls, teacher: TeacherConfig, student: "ModelFacts") -> "ModelFacts":
        return student

    @classmethod
    def identity(cls, teacher: TeacherConfig) -> str:
        return fingerprint(teacher.model)

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics, int]:
        """Score all rows with one version of the weights, which is at least the newest that wrote any of them.

        A stop id of a class of several is the class: its log-probability is that of all members that the engine lists,
        which are the most likely tokens and the written one.
        """
        token_ids, loss_mask = as_read_by(batch, request.model)
        rows = [(token_ids[row], np.flatnonzero(loss_mask[row]).astype(np.int32)) for row in range(len(token_ids))]
        newest = max(batch["max_policy_version"].to_pylist(), default=0)
        merged = self._teacher.stop_class if len(self._teacher.stop_class) > 1 else ()
        listed, version = await self._ask(rows, request.top_k + len(merged), newest)
        logprobs, ids, of_candidates = _columns(listed, merged, request.top_k)
        scores: dict[str, NDArray[Any]] = {"logprobs": logprobs}
        if request.top_k:
            scores |= {"candidate_ids": ids, "candidate_logprobs": of_candidates}
        return scores, {}, version

    async def _ask(self, rows: Sequence[tuple[Ints, Ints]], count: int, newest: int) -> tuple[Listed, int]:
        """Ask until an actor with new enough weights answers; those that died are asked no more."""
        import ray

        num_tokens = sum(len(ids) for ids, _ in rows)
        deadline = time.monotonic() + self._teacher.retry_seconds
        while time.monotonic() < deadline:
            await self._list_actors()
            for name in sorted(self._actors, key=self._loads.__getitem__):
                self._loads[name] += num_tokens
                try:
                    ids, logprobs, version = await self._actors[name].prompt_logprobs.remote(rows, count, newest)
                except (ray.exceptions.RayActorError, ActorDiedError):
                    self._actors.pop(name, None)
                except ray.exceptions.RayTaskError as error:
                    raise ScoreError(f"{name} could not score: {error.cause}") from error
                else:
                    if version >= newest:
                        return (ids, logprobs), version
                finally:
                    self._loads[name] -= num_tokens
            await asyncio.sleep(WAIT_SECONDS)
        raise ScoreError(
            f"no rollout engine scored with weights of version {newest} or later within teachers.NAME.retry_seconds = "
            f"{self._teacher.retry_seconds:g}; see what `preceptor status` says of the rollout pool"
        )

    async def _list_actors(self) -> None:
        """Find out which actors there are, once in a while; at once when none is known."""
        if self._actors and time.monotonic() < self._listed_at + LISTING_SECONDS:
            return
        self._listed_at = time.monotonic()
        named = await asyncio.to_thread(_rollout_actors)
        self._actors = {name: self._actors.get(name, actor) for name, actor in named.items()}


def _rollout_actors() -> dict[str, Any]:
    """Return the rollout actors of this run by their names."""
    import ray

    actors = {}
    for name in ray.util.list_named_actors():
        if ROLLOUT_ACTORS.fullmatch(name):
            try:
                actors[name] = ray.get_actor(name)
            except ValueError:  # it ended just now
                continue
    return actors


def _columns(listed: Listed, stop_class: Sequence[int], top_k: int) -> tuple[Floats, Ints, Floats]:
    """Return logprobs [sampled_tokens], and ids and logprobs [sampled_tokens, top_k] of the most likely classes.

    Example:
        >>> listed = np.array([[5, 1, 4, 5]], np.int32), np.log(np.array([[0.2, 0.5, 0.3, 0.2]], np.float32))
        >>> own, ids, logprobs = _columns(listed, (4, 5), 2)
        >>> np.exp(own).round(3).tolist(), ids.tolist(), np.exp(logprobs).round(3).tolist()
        ([0.5], [[1, 4]], [[0.5, 0.5]])
    """
    tokens, own, ids, logprobs = listed[0][:, :1], listed[1][:, 0], listed[0][:, 1:], listed[1][:, 1:]
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
