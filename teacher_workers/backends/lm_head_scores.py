"""From a teacher's last hidden states to its scores; pure, and without Python work per token.

The hidden state of position t - 1 predicts the token at position t. The LM head runs over a chunk of completion tokens
at a time, so at most one chunk of [chunk, vocabulary] logits lives at once.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.contracts.errors import WrongLengthError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Bytes, Ints, Scores
from cluster.models.lm_head import LmHead

FLOOR = -87.0  # of ids that the teacher does not have: the log of float32's smallest normal number is -87.3
# Allocating and touching large logits costs more than computing with them; a chunk of few tokens reads the head's
# weights too often. Measured on CPU with 49,152 tokens of vocabulary, in fp32 logits:
CHUNK_LOGITS = 1 << 23
MIN_CHUNK_TOKENS = 128
GPU_CHUNK_LOGITS = 1 << 27  # 512 MiB: a GPU needs larger products to be busy


def predicting_rows(hidden: Tensor, loss_mask: Bytes, num_cached: int = 0) -> Tensor:
    """Return the hidden states that predict the tokens whose loss_mask is 1.

    Args:
        hidden: [tokens - num_cached, width] of one trajectory.
        loss_mask: [tokens]; the first is 0.
        num_cached: positions at the beginning that have no hidden states, because the engine did not compute them.

    Raises:
        WrongLengthError: there is not one hidden state for each position after those, so positions would be shifted.
    """
    if len(hidden) + num_cached != len(loss_mask):
        raise WrongLengthError(
            f"the engine returned {len(hidden)} hidden states for {len(loss_mask)} tokens, {num_cached} of them "
            "cached; positions would be shifted"
        )
    return hidden[torch.from_numpy(np.flatnonzero(loss_mask) - 1 - num_cached)]


@torch.inference_mode()
def score_tokens(
    head: LmHead, hidden: Tensor, target_ids: Ints, request: ScoreRequest, candidate_ids: Ints | None = None
) -> Scores:
    """Score the written tokens, and what else the request asks for.

    Args:
        head: of the teacher.
        hidden: [completion_tokens, width] as the teacher's engine returns them.
        target_ids: [completion_tokens] the written tokens.
        request: what to return.
        candidate_ids: [completion_tokens, k] to score, where the request has given candidates.
    """
    given = np.empty((len(target_ids), 0), np.int32) if candidate_ids is None else candidate_ids
    ids = torch.from_numpy(np.concatenate([target_ids[:, None], given], axis=1).astype(np.int64))  # [tokens, 1 + k]
    device, chunk_tokens = head.weight.device, chunk_size(head)
    chunks = [
        _score_chunk(head, chunk.to(device), chunk_ids.to(device), request)
        for chunk, chunk_ids in zip(hidden.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    ]
    logprobs, chosen, chosen_logprobs, entropy = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
    candidate_logprobs = chosen_logprobs if request.top_k else logprobs[:, 1:]
    return Scores(
        logprobs=logprobs[:, 0],
        chosen_ids=chosen.astype(np.int32) if request.top_k else None,
        candidate_logprobs=candidate_logprobs if request.top_k or request.given_candidates else None,
        entropy=entropy if request.entropy else None,
        hidden=_to_numpy(hidden) if request.hidden else None,
    )


def chunk_size(head: LmHead) -> int:
    """Return how many tokens' logits may live at once."""
    logits = CHUNK_LOGITS if head.weight.device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(MIN_CHUNK_TOKENS, logits // head.vocabulary_size)


def _score_chunk(head: LmHead, hidden: Tensor, ids: Tensor, request: ScoreRequest) -> tuple[Tensor, ...]:
    """Return logprobs [n, 1 + k] of the ids, ids and logprobs [n, top_k] of the most likely tokens, entropy [n]."""
    logits = head.logits(hidden)
    is_known = ids < head.vocabulary_size
    asked = logits.gather(-1, ids.where(is_known, 0))
    best, best_ids = logits.topk(request.top_k, dim=-1)
    # In place from here on: a second tensor of this size costs more than the arithmetic.
    largest = best[:, :1] if request.top_k else logits.amax(dim=-1, keepdim=True)
    logits.sub_(largest)
    entropy = logits.new_empty(len(logits))
    if request.entropy:
        weights = logits.exp()
        total = weights.sum(dim=-1, keepdim=True)
        entropy = total.log().squeeze(-1) - (weights.mul_(logits).sum(dim=-1) / total.squeeze(-1))
    else:
        total = logits.exp_().sum(dim=-1, keepdim=True)
    normalizer = largest + total.log()
    return (asked - normalizer).where(is_known, FLOOR), best_ids, best - normalizer, entropy


def _to_numpy(hidden: Tensor) -> NDArray[Any]:
    """Return the same numbers; numpy has no bfloat16, so its bits."""
    bits = hidden.view(torch.uint16) if hidden.dtype == torch.bfloat16 else hidden
    return bits.contiguous().numpy()
