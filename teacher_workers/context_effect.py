"""Measures how much a teacher's context says: the divergence of what it predicts with it from what it predicts without.

Of some rows, the teacher names its most likely tokens with the context and scores the same ones without it. The KL
divergence over these tokens and the rest as one more is at most that of the whole distributions, at the places that the
student reached.
"""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.contracts.metrics import Mean, Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import rows_with_prompts, to_score_again
from cluster.contracts.trajectory import Ints
from teacher_workers.backends.base import TeacherBackend

NUM_TOKENS = 16  # that are compared at every place, besides the rest
SMALLEST = 1e-7  # probability of the rest; float32 sums are no better


async def context_effect(backend: TeacherBackend, batch: pa.RecordBatch, request: ScoreRequest) -> Metrics:
    """Return `MODEL/context_kl`, in nats per token; nothing where the batch has no row to compare.

    Raises:
        ScoreError: the backend cannot score the rows.
    """
    rows = _chosen(batch, rows_with_prompts(batch, request.model), request.compared_rows)
    if not len(rows):
        return {}
    with_context, *_ = await backend.score(
        to_score_again(batch, rows, [request.model]), ScoreRequest(request.model, top_k=NUM_TOKENS)
    )
    same_tokens = to_score_again(batch, rows, [], with_context["candidate_ids"])
    without, *_ = await backend.score(same_tokens, ScoreRequest(request.model, given_candidates=True))
    kl = listed_kl(with_context["candidate_logprobs"], without["candidate_logprobs"])
    return {f"{request.model}/context_kl": Mean(float(kl.sum()), float(len(kl)))}


def listed_kl(logprobs: NDArray[np.float32], other_logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return KL(first || other) at each place, over k listed tokens, [places, k], and the rest as one more.

    Example:
        >>> listed_kl(np.log([[0.5]]), np.log([[0.25]])).round(4).tolist()
        [0.1438]
    """
    first, other = (np.asarray(values, np.float64) for values in (logprobs, other_logprobs))
    rest, other_rest = (np.maximum(1 - np.exp(values).sum(-1), SMALLEST) for values in (first, other))
    kl: NDArray[np.float64] = (np.exp(first) * (first - other)).sum(-1) + rest * np.log(rest / other_rest)
    return kl


def _chosen(batch: pa.RecordBatch, rows: Ints, share: float) -> Ints:
    """Return a share of the rows, by their trajectories' numbers: the same ones whenever a step is done again."""
    numbers = batch["trajectory_id"].to_numpy()[rows].astype(np.uint64)
    with np.errstate(over="ignore"):
        scrambled = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
    chosen: Ints = rows[(scrambled >> np.uint64(40)).astype(np.float64) < share * 2**24]
    return chosen
