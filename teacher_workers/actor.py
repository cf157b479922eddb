"""Scores batches in a Ray actor: bytes and a request in, the same rows with one more model's columns out."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cluster.actors.liveness import end_with_engine
from cluster.actors.object_store import pack
from cluster.config.context import GentlenessConfig
from cluster.config.stages import TeacherConfig
from cluster.config.terms import TEACHER
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ActorDiedError, ScoreError
from cluster.contracts.metrics import Mean, Metric, Metrics, Sum
from cluster.contracts.pieces import Pieces
from cluster.contracts.requests import Completion, SamplingSettings, ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import SIGNALS
from cluster.contracts.trajectory import STUDENT, Floats, add_scores, ragged, version_field
from cluster.contracts.wire import from_wire
from cluster.vllm.engine import prepare_environment
from cluster.vllm.weight_sync.served_weights import ServedWeights
from cluster.vllm.weight_sync.updates import WeightVerbs
from teacher_workers.backends.base import TeacherBackend, find_backend
from teacher_workers.context_effect import context_effect


class TeacherWorker:
    """Adds a backend's scores to batches, and refuses scores that cannot be a language model's."""

    def __init__(self, name: str, backend: TeacherBackend, gentleness: GentlenessConfig | None = None) -> None:
        self._name, self._gentleness = name, gentleness
        self.backend = backend
        self.weights = ServedWeights(backend)

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[pa.RecordBatch, Metrics]:
        """Score all rows.

        Raises:
            ScoreError: the backend refused, a signal is missing, a column does not have one value per sampled token
                (WrongLengthError) or is not finite (NotFiniteError); names the teacher and the replica.
        """
        started = perf_counter()
        try:
            async with self.weights.in_use() as version:
                scores, metrics, *of_others = await self.backend.score(batch, request)
                version = of_others[0] if of_others else version
                if request.compared_rows:
                    metrics = {**metrics, **await context_effect(self.backend, batch, request)}
            if scores.keys() != request.signals:
                raise ScoreError(f"the backend sent {sorted(scores)}; the request was for {sorted(request.signals)}")
            # In a thread, for it reads every value, and the event loop must go on feeding the engine.
            scored = await asyncio.to_thread(add_scores, batch, request.model, scores, version)
        except ScoreError as error:
            raise type(error)(f"{self._name}: {error}") from error
        # An evaluation asks for no candidates, and its rewards stay.
        if self._gentleness is not None and request.model == TEACHER and request.top_k:
            scored, of_rewards = with_gentle_rewards(scored, self._gentleness)
            metrics = {**metrics, **of_rewards}
        return scored, _metrics(scored, request.model, metrics, perf_counter() - started)


class TeacherActor(WeightVerbs):
    """Runs one TeacherWorker in an actor and keeps trajectory bytes in the object store."""

    def __init__(self, name: str, teacher: TeacherConfig, max_model_len: int) -> None:
        self._name = name
        self._teacher = teacher
        self._max_model_len = max_model_len
        self._worker: TeacherWorker | None = None  # None: not started
        self._watching: asyncio.Task[None] | None = None

    @property
    def weights(self) -> ServedWeights:
        assert self._worker is not None, "weights come when the actor has started"
        return self._worker.weights

    async def start(self) -> None:
        """Build the backend; here and not in the constructor, because its engine belongs to the event loop."""
        worker = self._worker = start_worker(self._name, self._teacher, self._max_model_len)
        self._watching = asyncio.create_task(end_with_engine(lambda: worker.backend.is_dead))

    async def score(self, wire: pa.Buffer, request: ScoreRequest) -> tuple[Pieces, BatchHandle]:
        """Score one batch; Ray has fetched its bytes to this node before the call."""
        assert self._worker is not None, "a pool sends batches to actors that have started"
        return pack_scored(wire, *await self._worker.score(from_wire(wire), request), request.model)

    async def generate(
        self, prompt_ids: Sequence[int], sampling: SamplingSettings, seed: int, priority: int
    ) -> Completion:
        """Sample one completion for a rollout worker, as the backend does."""
        if self._worker is None:  # its name is listed before
            raise ActorDiedError(f"{self._name} has not started")
        return await self._worker.backend.generate(prompt_ids, sampling, seed, priority)

    async def abandon(self) -> None:
        """Be ready for weights of any version; during an update this is refused."""
        self.refuse_half_updated()

    async def shutdown(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        if self._worker is not None:
            await self._worker.backend.shutdown()


def start_worker(name: str, teacher: TeacherConfig, max_model_len: int, sleeps: bool = False) -> TeacherWorker:
    """Start a backend and the worker that scores with it; called in the event loop."""
    prepare_environment(teacher.engine)  # before a backend loads vLLM or torch
    return TeacherWorker(name, find_backend(teacher)(teacher, max_model_len, sleeps), teacher.gentleness)


def pack_scored(wire: pa.Buffer, batch: pa.RecordBatch, metrics: Metrics, model: str) -> tuple[Pieces, BatchHandle]:
    """Return a scored batch's bytes and handle; `wire` is the batch as it came."""
    scored, handle = pack(batch, metrics)
    added = Mean(float(scored.size - wire.size), float(sum(handle.num_completion_tokens)))
    metrics = {**handle.metrics, f"{model}/bytes_per_token": added}
    return scored, replace(handle, metrics=metrics, scorer_version=batch[version_field(model).name][0].as_py())


def with_gentle_rewards(scored: pa.RecordBatch, config: GentlenessConfig) -> tuple[pa.RecordBatch, Metrics]:
    """Return a scored batch whose rewards are R * G, and the mean of G; rows without a reward stay as they are.

    In Pedagogical RL the student of such a run learns to write for the teacher, which is that student without what it
    reads: R * G says right, and near to what the teacher would write by itself.

    All rows of an episode are one text. The teacher has chosen the candidates, so its favourite is the best of them or
    the sampled token.
    """
    columns = (SIGNALS[name].column(TEACHER) for name in ("logprobs", "candidate_logprobs"))
    own, candidates = (ragged(scored, name) for name in columns)
    episodes, rewards = scored["episode_id"].to_pylist(), scored["reward"].to_pylist()
    of_episode: dict[int, list[int]] = {}
    for row, episode in enumerate(episodes):
        of_episode.setdefault(episode, []).append(row)
    gentleness = {
        episode: config.of(
            np.concatenate([own[row] for row in rows]), np.concatenate([candidates[row].max(1) for row in rows])
        )
        for episode, rows in of_episode.items()
    }
    rated = [gentleness[episodes[rows[-1]]] for rows in of_episode.values() if rewards[rows[-1]] is not None]
    gentle = [
        None if reward is None else reward * gentleness[episode]
        for episode, reward in zip(episodes, rewards, strict=True)
    ]
    position = scored.schema.get_field_index("reward")
    field = scored.schema.field(position)
    metrics = {"teacher/gentleness": Mean(sum(rated), float(len(rated)))} if rated else {}
    return scored.set_column(position, field, pa.array(gentle, field.type)), metrics


def _metrics(scored: pa.RecordBatch, model: str, of_backend: Metrics, seconds: float) -> dict[str, Metric]:
    logprobs, _ = _compared(scored, model)
    num_tokens, num_scored = float(as_read_by(scored, model)[0].offsets[-1]), float(len(logprobs))
    metrics: dict[str, Metric] = {
        f"{model}/tokens": Sum(num_tokens),
        **of_backend,
        f"{model}/scored_tokens": Sum(num_scored),
        f"{model}/seconds": Sum(seconds),
        f"{model}/logprob": Mean(float(logprobs.sum(dtype=np.float64)), num_scored),
    }
    return metrics | _distances(_of_student(scored)) if model == TEACHER else metrics


def _distances(scored: pa.RecordBatch) -> dict[str, Metric]:
    """Return how far the teacher is from the sampler of some rows; nothing without rows."""
    logprobs, rollout_logprobs = _compared(scored, TEACHER)
    if not scored.num_rows:
        return {}
    gap, num_scored = rollout_logprobs - logprobs, float(len(logprobs))
    metrics: dict[str, Metric] = {
        # One-sample estimate of KL(sampler || teacher); of the student itself when it sampled at temperature 1.
        "teacher/sampled_kl": Mean(float(gap.sum(dtype=np.float64)), num_scored),
        "teacher/log_ratio": Mean(float(np.abs(gap).sum(dtype=np.float64)), num_scored),
    }
    if SIGNALS["aligned"].column(TEACHER) not in scored.schema.names and len(tail := cut_tail(scored)):
        of_tail = float(np.abs(gap[tail]).sum(dtype=np.float64))
        metrics["teacher/cut_tail_log_ratio"] = Mean(of_tail, float(len(tail)))
    return metrics


def _compared(scored: pa.RecordBatch, model: str) -> tuple[Floats, Floats]:
    """Return the model's and the sampler's log-probabilities of the tokens that the model scored."""
    logprobs, rollout_logprobs = (ragged(scored, name).values for name in (f"{model}_logprobs", "rollout_logprobs"))
    aligned = SIGNALS["aligned"].column(model)
    if aligned not in scored.schema.names:
        return logprobs, rollout_logprobs
    strict = ragged(scored, aligned).values != 0
    return logprobs[strict], rollout_logprobs[strict]


def _of_student(scored: pa.RecordBatch) -> pa.RecordBatch:
    """Return the rows that the student sampled from its own prompts; a privileged sampler's are far by intent."""
    is_own = pc.equal(scored["sampler"], STUDENT)
    return scored if pc.all(is_own).as_py() else scored.filter(is_own)


def cut_tail(batch: pa.RecordBatch) -> NDArray[np.int64]:
    """Return the places, among all completion tokens, of the last quarter of each completion that was cut off."""
    ends = ragged(batch, "rollout_logprobs").offsets
    is_cut = pc.equal(batch["finish_reason"], "length").to_pylist()
    rows = zip(ends, ends[1:], is_cut, strict=False)
    tails = [np.arange(last - (last - first) // 4, last) for first, last, cut in rows if cut]
    return np.concatenate([np.empty(0, np.int64), *tails])
