"""One teacher worker: batches in, the same rows with one more model's columns out."""

import asyncio
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np
import pyarrow as pa
import torch

from cluster.config.objective import TEACHER
from cluster.contracts.errors import ScoreError, UniformError, WrongLengthError
from cluster.contracts.metrics import Mean, Metric, Metrics, Sum
from cluster.contracts.protocols import ScoringEngine
from cluster.contracts.requests import HiddenStates, ScoreRequest
from cluster.contracts.trajectory import Floats, add_scores, num_candidates_of, ragged
from cluster.models.lm_head import LmHead
from teacher_workers.backends.lm_head_scores import score_tokens

UNIFORM_TOLERANCE = 1e-5  # nats; float32 log-probabilities near -12 are exact to 1e-6, no real text is this even


class TeacherWorker:
    """Scores batches with an engine and an LM head, and refuses scores that cannot be a language model's."""

    def __init__(self, name: str, engine: ScoringEngine, head: LmHead) -> None:
        """Take an engine.

        Args:
            name: teacher and replica, for errors.
            engine: reads one trajectory at a time, many at once.
            head: of the engine's model.
        """
        self._name = name
        self._engine = engine
        self._head = head
        self._device = head.weight.device
        self._num_requests = 0
        # The head runs beside the event loop, which goes on feeding the engine with the next batches. One thread: each
        # thread that calls torch brings a set of OpenMP threads of its own.
        self._head_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lm-head")

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[pa.RecordBatch, Metrics]:
        """Score all rows; the engine decides how many run together, and with rows of which batches.

        Raises:
            ScoreError: hidden states are missing or misplaced (WrongLengthError), scores are not finite
                (NotFiniteError) or all alike (UniformError), or the batch lacks the candidates that are to be scored;
                names the teacher and the replica.
        """
        started = perf_counter()
        try:
            found = await self._hidden_states(batch)
            hidden = [row.values for row in found]
            loop = asyncio.get_running_loop()
            scored = await loop.run_in_executor(self._head_thread, self._add_scores, batch, request, hidden)
        except ScoreError as error:
            raise type(error)(f"{self._name}: {error}") from error
        num_cached = sum(row.num_cached_tokens for row in found)
        return scored, _metrics(scored, request.model, num_cached, perf_counter() - started)

    @property
    def is_dead(self) -> bool:
        """Return whether the engine's process is gone."""
        return self._engine.is_dead

    async def sleep(self) -> None:
        """Give the memory of engine and head back to others; nothing may be asked until it is woken."""
        self._head = self._head.to("cpu")
        torch.cuda.empty_cache()  # else torch keeps the head's memory for this process; does nothing without a GPU
        await self._engine.sleep()

    async def wake(self) -> None:
        """Take the memory again.

        Raises:
            ModelError: the engine does not start again.
        """
        await self._engine.wake()
        self._head = self._head.to(self._device)

    async def shutdown(self) -> None:
        """End the engine."""
        self._head_thread.shutdown()
        await self._engine.shutdown()

    async def _hidden_states(self, batch: pa.RecordBatch) -> list[HiddenStates]:
        token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
        first = self._num_requests
        self._num_requests += len(token_ids)
        rows = range(len(token_ids))
        return await asyncio.gather(
            *(self._engine.hidden_states(str(first + row), token_ids[row], loss_mask[row]) for row in rows)
        )

    def _add_scores(
        self, batch: pa.RecordBatch, request: ScoreRequest, hidden: Sequence[torch.Tensor]
    ) -> pa.RecordBatch:
        if request.given_candidates and not num_candidates_of(batch):
            raise ScoreError(f"{request.model} is to score candidates, but the batch has none")
        refuse_misplaced(batch, hidden, self._head.weight.shape[1])
        written = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
        candidates = ragged(batch, "candidate_ids").values if request.given_candidates else None
        scores = score_tokens(self._head, torch.cat(list(hidden)), written, request, candidates)
        scored = add_scores(batch, request.model, scores)
        refuse_uniform(scores.logprobs, self._head.vocabulary_size)
        return scored


def refuse_misplaced(batch: pa.RecordBatch, hidden: Sequence[torch.Tensor], width: int) -> None:
    """Refuse hidden states that are not one per completion token of each row, or not those of the head's model.

    The batch's total is not enough: a row that lacks one beside a row with one too many would shift what lies between.

    Raises:
        WrongLengthError: they are not.
    """
    expected = ragged(batch, "rollout_logprobs").lengths
    for row, (values, num_tokens) in enumerate(zip(hidden, expected, strict=True)):
        if tuple(values.shape) != (num_tokens, width):
            raise WrongLengthError(
                f"trajectory {batch['trajectory_id'][row].as_py()}: the engine returned hidden states of shape "
                f"{list(values.shape)}, {num_tokens} completion tokens and this LM head need {[int(num_tokens), width]}"
            )


def refuse_uniform(logprobs: Floats, vocabulary_size: int) -> None:
    """Refuse a batch of several tokens that were all scored -log(vocabulary size): the model's weights are not loaded.

    Raises:
        UniformError: they were.
    """
    uniform = -math.log(vocabulary_size)
    if len(logprobs) > 1 and np.allclose(logprobs, uniform, rtol=0, atol=UNIFORM_TOLERANCE):
        raise UniformError(
            f"all {len(logprobs)} tokens were scored {uniform:.4f}, as if every token of the vocabulary were equally "
            "likely; the teacher's weights are missing or damaged"
        )


def _metrics(scored: pa.RecordBatch, model: str, num_cached: int, seconds: float) -> dict[str, Metric]:
    logprobs = ragged(scored, f"{model}_logprobs").values
    num_tokens, num_scored = float(ragged(scored, "token_ids").offsets[-1]), float(len(logprobs))
    metrics: dict[str, Metric] = {
        f"{model}/tokens": Sum(num_tokens),
        f"{model}/prefix_hit_ratio": Mean(float(num_cached), num_tokens),
        f"{model}/scored_tokens": Sum(num_scored),
        f"{model}/seconds": Sum(seconds),
        f"{model}/logprob": Mean(float(logprobs.sum(dtype=np.float64)), num_scored),
    }
    if model == TEACHER:
        # One-sample estimate of KL(sampler || teacher); of the student itself when it sampled at temperature 1.
        gap = ragged(scored, "rollout_logprobs").values - logprobs
        metrics["teacher/sampled_kl"] = Mean(float(gap.sum(dtype=np.float64)), num_scored)
    return metrics
