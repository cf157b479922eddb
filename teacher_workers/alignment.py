"""From vLLM's prompt log-probabilities to the teacher's columns; pure, and without Python work per token.

vLLM describes position t of a sequence by the token that stands there given everything before it. Its flat form holds,
for each position from 1 on, the token that stands there, followed by the k most likely ones, best first; a token that
is both is listed twice. Position 0 has no entry, for nothing precedes it.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cluster.contracts.errors import ScoreError
from cluster.contracts.trajectory import Bytes, Ints, TeacherScores


class FlatPromptLogprobs(Protocol):
    """vLLM's FlatLogprobs, as far as it is used here."""

    start_indices: list[int]  # [tokens] of each position's first entry
    end_indices: list[int]  # [tokens] one past its last
    token_ids: list[int]  # [entries]
    logprobs: list[float]  # [entries]


def align(flat: FlatPromptLogprobs, token_ids: Ints, loss_mask: Bytes, top_k: int) -> TeacherScores:
    """Return the scores of the positions whose loss_mask is 1.

    Args:
        flat: what vLLM returned for the whole sequence.
        token_ids: [tokens] the sequence.
        loss_mask: [tokens]; the first is 0.
        top_k: how many of the most likely tokens to return; 0 for none.

    Raises:
        ScoreError: vLLM covers another number of positions, holds another number of entries, or scored other tokens.
    """
    if len(flat.start_indices) != len(token_ids):
        raise ScoreError(f"vLLM scored {len(flat.start_indices)} positions of {len(token_ids)} tokens")
    positions = np.flatnonzero(loss_mask)  # [completion_tokens]
    starts = np.asarray(flat.start_indices, dtype=np.int64)[positions]
    widths = np.asarray(flat.end_indices, dtype=np.int64)[positions] - starts
    if (widths != top_k + 1).any():
        raise ScoreError(f"vLLM returned {np.unique(widths).tolist()} entries per position, expected {top_k + 1}")
    first = int(starts[0]) if len(starts) else 0  # the prompt's entries, often most of them, are never converted
    ids = _tail(flat.token_ids, first, np.int32)
    logprobs = _tail(flat.logprobs, first, np.float32)
    sampled = starts - first
    if (ids[sampled] != token_ids[positions]).any():
        raise ScoreError("vLLM scored other tokens than those of the trajectory; the positions are shifted")
    if top_k == 0:
        return TeacherScores(logprobs=logprobs[sampled])
    best = sampled[:, None] + 1 + np.arange(top_k)  # [completion_tokens, k]
    return TeacherScores(logprobs=logprobs[sampled], topk_ids=ids[best], topk_logprobs=logprobs[best])


def _tail(values: Sequence[float], first: int, dtype: type) -> np.ndarray:
    return np.asarray(values[first:], dtype=dtype)
