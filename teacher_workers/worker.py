"""One teacher worker: generated batches in, the same rows with the teacher's columns out."""

import asyncio
import math
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import pyarrow as pa

from cluster.contracts.errors import ScoreError
from cluster.contracts.interfaces import ScoringEngine
from cluster.contracts.metrics import Mean, Metric, Metrics, Sum
from cluster.contracts.trajectory import TeacherScores, add_scores, ragged

UNIFORM_TOLERANCE = 1e-5  # nats; float32 log-probabilities near -12 are exact to 1e-6, no real text is this even


class TeacherWorker:
    """Scores batches with an engine and refuses scores that cannot be a language model's."""

    def __init__(self, name: str, engine: ScoringEngine, vocabulary_size: int, top_k: int) -> None:
        """Take an engine.

        Args:
            name: teacher and replica, for errors.
            engine: scores one trajectory at a time, many at once.
            vocabulary_size: of the teacher.
            top_k: width of the top-k columns; 0 for the signal "sampled".
        """
        self._name = name
        self._engine = engine
        self._vocabulary_size = vocabulary_size
        self._top_k = top_k
        self._num_requests = 0

    async def score(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Metrics]:
        """Score all rows at once; the engine decides how many run together.

        Raises:
            ScoreError: scores are missing, misaligned, of the wrong length, not finite, or uniform; names the teacher.
        """
        started = perf_counter()
        token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
        first = self._num_requests
        self._num_requests += len(token_ids)
        try:
            scores = await asyncio.gather(
                *(
                    self._engine.score(str(first + row), token_ids[row], loss_mask[row], self._top_k)
                    for row in range(len(token_ids))
                )
            )
            scored = add_scores(batch, scores)
            refuse_uniform(scores, self._vocabulary_size)
        except ScoreError as error:
            raise ScoreError(f"{self._name}: {error}") from error
        return scored, _metrics(scored, token_ids.offsets[-1], perf_counter() - started)

    async def shutdown(self) -> None:
        """End the engine."""
        await self._engine.shutdown()


def refuse_uniform(scores: Sequence[TeacherScores], vocabulary_size: int) -> None:
    """Refuse a batch of several tokens that were all scored -log(vocabulary size): the model's weights are not loaded.

    Raises:
        ScoreError: they were.
    """
    logprobs = np.concatenate([score.logprobs for score in scores]) if scores else np.empty(0)
    uniform = -math.log(vocabulary_size)
    if len(logprobs) > 1 and np.allclose(logprobs, uniform, rtol=0, atol=UNIFORM_TOLERANCE):
        raise ScoreError(
            f"all {len(logprobs)} tokens were scored {uniform:.4f}, as if every token of the vocabulary were equally "
            "likely; the teacher's weights are missing or damaged"
        )


def _metrics(scored: pa.RecordBatch, num_tokens: int, seconds: float) -> dict[str, Metric]:
    logprobs = ragged(scored, "teacher_logprobs").values
    written = ragged(scored, "rollout_logprobs").values
    return {
        "teacher/tokens": Sum(float(num_tokens)),
        "teacher/scored_tokens": Sum(float(len(logprobs))),
        "teacher/seconds": Sum(seconds),
        "teacher/logprob": Mean(float(logprobs.sum()), float(len(logprobs))),
        # One-sample estimate of KL(sampler || teacher); of the student itself when it sampled at temperature 1.
        "teacher/sampled_kl": Mean(float((written - logprobs).sum(dtype=np.float64)), float(len(logprobs))),
    }
