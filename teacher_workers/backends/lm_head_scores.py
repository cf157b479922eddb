"""Turns a teacher's last hidden states into its scores, without Python work per token.

The hidden state of position t - 1 predicts the token at position t. The LM head runs over a chunk of completion tokens
at a time, so at most one chunk of [chunk, vocabulary] logits lives at once.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.contracts.errors import ScoreError, UniformError, WrongLengthError
from cluster.contracts.metrics import Mean, Metrics
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.scorer_prompts import as_read_by
from cluster.contracts.signals import Scores
from cluster.contracts.trajectory import Bytes, Floats, Ints, num_candidates_of, ragged
from cluster.models.lm_head import LmHead
from cluster.models.stop_class import merge_ids
from teacher_workers.backends.base import FLOOR, TeacherBackend

ABSENT = -1e4  # instead of a logit: its exponential is 0, and its product with that is too
# Allocating and touching large logits costs more than computing with them; a chunk of few tokens reads the head's
# weights too often. Measured on CPU with 49,152 tokens of vocabulary, in fp32 logits:
CHUNK_LOGITS = 1 << 23
MIN_CHUNK_TOKENS = 128
GPU_CHUNK_LOGITS = 1 << 27  # 512 MiB: a GPU needs larger products to be busy

MEASURED_TOKENS = 64  # of a batch, for the mass of shared tokens: a metric needs no more
UNIFORM_TOLERANCE = 1e-5  # nats; float32 log-probabilities near -12 are exact to 1e-6, no real text is this even


class HiddenStatesBackend(TeacherBackend, ABC):
    """Scores with an engine that returns hidden states, and the LM head of its model."""

    signals = frozenset({"logprobs", "candidate_ids", "candidate_logprobs", "entropy", "hidden"})
    reads_scorer_prompts = True

    def __init__(self, head: LmHead, layers_width: int = 0) -> None:
        """Take the head, and how many values of other layers the engine returns behind each last hidden state."""
        self._head, self._layers_width = head, layers_width
        self.shared_ids: Tensor | None = None  # tokens that a student of another tokenizer has too; None: all are
        self._num_requests = 0
        # The head runs beside the event loop, which goes on feeding the engine with the next batches. One thread: each
        # thread that calls torch brings a set of OpenMP threads of its own.
        self._head_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lm-head")

    @abstractmethod
    async def hidden_states(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[Tensor, int]:
        """Return the last hidden states of one trajectory, and how many of its positions the engine had cached.

        They are [sampled_tokens, width + layers_width], after the final norm, and predict the tokens whose loss_mask
        is 1; the values of other layers stand behind them.
        """

    async def score(self, batch: pa.RecordBatch, request: ScoreRequest) -> tuple[Scores, Metrics]:
        """Score all rows; the engine decides how many run together, and with rows of which batches.

        Raises:
            ScoreError: hidden states are missing or misplaced (WrongLengthError), all scores are alike (UniformError),
                or the batch lacks the candidates that are to be scored.
        """
        token_ids, loss_mask = as_read_by(batch, request.model)
        rows, first = range(len(token_ids)), self._num_requests
        self._num_requests += len(token_ids)
        states = await asyncio.gather(
            *(self._states_of(str(first + row), token_ids[row], loss_mask[row]) for row in rows)
        )
        hidden, cached = [values for values, _ in states], sum(num_cached for _, num_cached in states)
        loop = asyncio.get_running_loop()
        scores = await loop.run_in_executor(self._head_thread, self._apply_head, batch, request, hidden)
        metrics = {f"{request.model}/prefix_hit_ratio": Mean(float(cached), float(len(token_ids.values)))}
        if self.shared_ids is not None:
            some = torch.cat(hidden)[:MEASURED_TOKENS, : self._head.weight.shape[1]]
            mass = await loop.run_in_executor(self._head_thread, shared_mass, self._head, some, self.shared_ids)
            metrics[f"{request.model}/teacher_shared_mass"] = Mean(mass.sum().item(), float(len(mass)))
        return scores, metrics

    async def _states_of(self, request_id: str, token_ids: Ints, loss_mask: Bytes) -> tuple[Tensor, int]:
        if not loss_mask.any():  # a row without a context, of which nothing is learned
            return torch.empty(0, self._head.weight.shape[1] + self._layers_width), 0
        return await self.hidden_states(request_id, token_ids, loss_mask)

    def move_head(self, device: str) -> None:
        self._head = self._head.to(device)

    async def shutdown(self) -> None:
        self._head_thread.shutdown()

    def _apply_head(self, batch: pa.RecordBatch, request: ScoreRequest, hidden: Sequence[Tensor]) -> Scores:
        if request.given_candidates and not num_candidates_of(batch):
            raise ScoreError(f"{request.model} is to score candidates, but the batch has none")
        width = self._head.weight.shape[1]
        refuse_misplaced(batch, hidden, width + self._layers_width)
        sampled = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
        candidates = ragged(batch, "candidate_ids").values if request.given_candidates else None
        states = torch.cat([values for values in hidden if len(values)] or list(hidden))
        last, layers = states.split([width, self._layers_width], dim=-1)
        scores = score_tokens(self._head, last, sampled, request, candidates)
        if request.layers:
            scores = {**scores, "layers": _bits(layers)}
        num_excluded = 0 if self._head.excluded_ids is None else len(self._head.excluded_ids)
        is_text = ~np.isin(sampled, self._head.stop_class)  # a class of stop ids is likelier than one token
        refuse_uniform(scores["logprobs"][is_text], self._head.vocabulary_size - num_excluded)
        return scores


@torch.inference_mode()
def shared_mass(head: LmHead, hidden: Tensor, ids: Tensor) -> Tensor:
    """Return the probability of all `ids` together at each position, [n], for hidden states [n, width]."""
    probabilities = head.logits(hidden.to(head.weight.device)).softmax(-1)
    return probabilities[:, ids.to(head.weight.device)].sum(-1)


def refuse_misplaced(batch: pa.RecordBatch, hidden: Sequence[Tensor], width: int) -> None:
    """Refuse hidden states that are not one per sampled token of each row, or not those of the head's model.

    The batch's total is not enough: a row that lacks one beside a row with one too many would shift what lies between.
    """
    expected = ragged(batch, "rollout_logprobs").lengths
    for row, (values, num_tokens) in enumerate(zip(hidden, expected, strict=True)):
        if tuple(values.shape) != (num_tokens, width):
            raise WrongLengthError(
                f"trajectory {batch['trajectory_id'][row].as_py()}: the engine returned hidden states of shape "
                f"{list(values.shape)}, {num_tokens} completion tokens and this LM head need {[int(num_tokens), width]}"
            )


def refuse_uniform(logprobs: Floats, vocabulary_size: int) -> None:
    """Refuse several tokens that were all scored -log(vocabulary size): the model's weights are not loaded."""
    uniform = -math.log(vocabulary_size)
    if len(logprobs) > 1 and np.allclose(logprobs, uniform, rtol=0, atol=UNIFORM_TOLERANCE):
        raise UniformError(
            f"all {len(logprobs)} tokens were scored {uniform:.4f}, as if every token of the vocabulary were equally "
            "likely; the teacher's weights are missing or damaged"
        )


def predicting_rows(hidden: Tensor, loss_mask: Bytes, num_cached: int = 0) -> Tensor:
    """Return the hidden states that predict the tokens whose loss_mask is 1.

    Of one trajectory: `hidden` is [tokens - num_cached, width], for the engine did not compute the first `num_cached`.

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
    """Score the sampled tokens, and compute the other signals of the request.

    `hidden` is [completion_tokens, width] as the teacher's engine returns it. The sampled tokens `target_ids` are
    [completion_tokens], and `candidate_ids` [completion_tokens, k], where the request has given candidates.
    """
    given = np.empty((len(target_ids), 0), np.int32) if candidate_ids is None else candidate_ids
    ids = torch.from_numpy(np.concatenate([target_ids[:, None], given], axis=1).astype(np.int64))  # [tokens, 1 + k]
    ids = merge_ids(ids, head.stop_class)
    device, chunk_tokens = head.weight.device, chunk_size(head)
    chunks = [
        _score_chunk(head, chunk.to(device), chunk_ids.to(device), request)
        for chunk, chunk_ids in zip(hidden.split(chunk_tokens), ids.split(chunk_tokens), strict=True)
    ]
    logprobs, chosen, chosen_logprobs, entropy = (torch.cat(parts).cpu().numpy() for parts in zip(*chunks, strict=True))
    scores: dict[str, NDArray[Any]] = {"logprobs": logprobs[:, 0]}
    if request.top_k:
        scores |= {"candidate_ids": chosen.astype(np.int32), "candidate_logprobs": chosen_logprobs}
    elif request.given_candidates:
        scores["candidate_logprobs"] = logprobs[:, 1:]
    if request.entropy:
        scores["entropy"] = entropy
    if request.hidden:
        scores["hidden"] = _bits(hidden)
    return scores


def _bits(states: Tensor) -> NDArray[Any]:
    """Return states as numpy, which has no bfloat16: uint16 holds its bits."""
    states = states.contiguous()
    return (states.view(torch.uint16) if states.dtype == torch.bfloat16 else states).numpy()


def chunk_size(head: LmHead) -> int:
    """Return how many tokens' logits may live at once."""
    logits = CHUNK_LOGITS if head.weight.device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(MIN_CHUNK_TOKENS, logits // head.vocabulary_size)


def _score_chunk(head: LmHead, hidden: Tensor, ids: Tensor, request: ScoreRequest) -> tuple[Tensor, ...]:
    """Return logprobs [n, 1 + k] of the ids, ids and logprobs [n, top_k] of the most likely tokens, entropy [n]."""
    logits = head.logits(hidden)
    is_known = ids < head.vocabulary_size
    if head.excluded_ids is not None:
        is_known &= ~torch.isin(ids, head.excluded_ids)
    requested = logits.gather(-1, ids.where(is_known, 0))
    best, best_ids = logits.topk(request.top_k, dim=-1)
    # In place from here on: a second tensor of this size costs more than the arithmetic.
    largest, largest_ids = (best[:, :1], best_ids[:, :1]) if request.top_k else logits.max(dim=-1, keepdim=True)
    # Beside 1, the largest's own exponential, small ones would be lost: the sum is that of the others.
    logits.sub_(largest).scatter_(-1, largest_ids, ABSENT)
    entropy = logits.new_empty(len(logits))
    if request.entropy:
        weights = logits.exp()
        others = weights.sum(dim=-1, keepdim=True)
        entropy = (others.log1p() - weights.mul_(logits).sum(dim=-1, keepdim=True) / (1 + others)).squeeze(-1)
    else:
        others = logits.exp_().sum(dim=-1, keepdim=True)
    log_total = others.log1p()
    # Twice subtracted: the sum of the two would round what is left of large logits.
    return (requested - largest - log_total).where(is_known, FLOOR), best_ids, best - largest - log_total, entropy
