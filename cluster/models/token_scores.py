"""Turns a model's last hidden states into scores of tokens, without Python work per token.

The hidden state of position t - 1 predicts the token at position t. The LM head runs over a chunk of positions at a
time, so at most one chunk of [chunk, vocabulary] logits lives at once. What comes out is one record of bytes per
position: it leaves the process that has the head, which is vLLM's worker, as a single array.

Each tensor-parallel rank may hold some rows of the head: it reads its own logits, and the ranks exchange a few numbers
per position (`Part`), never logits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.config.stages import Dtype
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import FLOOR, Scores
from cluster.contracts.trajectory import Ints
from cluster.models.lm_head import LmHead
from cluster.models.stop_class import EXCLUDED_LOGIT, merge_ids

ABSENT = -1e4  # instead of a logit: its exponential is 0, and its product with that is too
# Allocating and touching large logits costs more than computing with them; a chunk of few tokens reads the head's
# weights too often. Measured on CPU with 49,152 tokens of vocabulary, in fp32 logits:
CHUNK_LOGITS = 1 << 23
MIN_CHUNK_TOKENS = 128
GPU_CHUNK_LOGITS = 1 << 27  # 512 MiB: a GPU needs larger products to be busy
GROUP = 64  # logits of which the largest alone is looked at first
# Rows of so few logits are sorted, on a CPU: at 112 logits and k = 16 that takes 0.4 us a row, and topk 1.5.
SORTED_PER_K, MAX_SORTED = 32, 2048
STATE_DTYPES: Mapping[Dtype, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}  # numpy has no bfloat16


class Layout(NamedTuple):
    """Says what the record of a position holds, in this order; the fields travel to vLLM's worker as a list."""

    num_given: int = 0  # tokens that are scored besides the sampled one
    top_k: int = 0  # most likely tokens
    entropy: bool = False
    shared_mass: bool = False  # the probability of all tokens that a student of another tokenizer has too
    hidden: bool = False
    layers: bool = False

    def dtype(self, state: str, width: int, layers_width: int) -> np.dtype[Any]:
        """Return a record's numpy type, for states of this numpy type and these widths."""
        fields: list[Any] = [("logprobs", "<f4", (1 + self.num_given,))]
        if self.top_k:
            fields += [("candidate_ids", "<i4", (self.top_k,)), ("candidate_logprobs", "<f4", (self.top_k,))]
        fields += [(name, "<f4") for name in ("entropy", "shared_mass") if getattr(self, name)]
        widths = {"hidden": width, "layers": layers_width}
        fields += [(name, state, (widths[name],)) for name in widths if getattr(self, name)]
        return np.dtype(fields)


def layout_of(request: ScoreRequest, num_candidates: int, shared_mass: bool = False) -> Layout:
    """Return the layout that answers a request to score a batch with so many candidates."""
    num_given = num_candidates if request.given_candidates else 0
    return Layout(num_given, request.top_k, request.entropy, shared_mass, request.hidden, request.layers)


def scores_in(records: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Return the signals that records [n] hold, and `shared_mass` where they have it."""
    scores = {name: records[name] for name in records.dtype.names or ()}
    logprobs = scores["logprobs"]
    if logprobs.shape[1] > 1:
        scores["candidate_logprobs"] = logprobs[:, 1:]
    return scores | {"logprobs": logprobs[:, 0]}


def _itself(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class HeadShard:
    """Holds the rows of an LM head that one of several ranks multiplies, or all of them."""

    rows: LmHead  # without the stop class, which may lie in the rows of several ranks
    first: int  # token of the first row
    vocabulary_size: int  # of the whole head
    excluded_ids: Tensor | None  # of the whole head
    stop_class: tuple[int, ...]
    gather: Callable[[Tensor], Tensor] = _itself  # [n, k] of this rank -> those of all ranks side by side
    shared: Tensor | None = None  # [rows] 1.0 for the tokens whose mass is asked for, else 0.0

    @staticmethod
    def of(
        head: LmHead,
        first: int = 0,
        vocabulary_size: int | None = None,
        gather: Callable[[Tensor], Tensor] = _itself,
    ) -> "HeadShard":
        """Return a shard of the rows of `head`, whose ids are those of `vocabulary_size` tokens; None: of its own."""
        size, excluded = head.vocabulary_size, head.excluded_ids
        own = None if excluded is None else excluded[(excluded >= first) & (excluded < first + size)] - first
        rows = replace(head, excluded_ids=own, stop_class=())
        return HeadShard(rows, first, vocabulary_size or size, excluded, head.stop_class, gather)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map [n, width] to new float32 logits of this rank's tokens, in which the stop class is one token."""
        logits = self.rows.logits(hidden)
        if self.stop_class:
            members = self._own(self.stop_class)
            of_class = logits[:, [token - self.first for token in members]]
            missing = of_class.new_full((len(logits), len(self.stop_class) - len(members)), -torch.inf)
            total = self.gather(torch.cat([of_class, missing], dim=-1)).logsumexp(-1)
            for token in members:
                is_first = token == self.stop_class[0]
                logits[:, token - self.first] = total if is_first else EXCLUDED_LOGIT
        return logits

    def _own(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if 0 <= token - self.first < self.rows.vocabulary_size]


def rows_of_rank(vocabulary_size: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the first of a rank's tokens and the one after its last.

    Example:
        >>> [rows_of_rank(10, rank, 3) for rank in range(3)]
        [(0, 4), (4, 8), (8, 10)]
    """
    share = -(-vocabulary_size // num_ranks)
    return min(rank * share, vocabulary_size), min((rank + 1) * share, vocabulary_size)


class Part(NamedTuple):
    """Holds what a rank's logits say of n positions."""

    requested: Tensor  # [n, 1 + given] logits of the requested ids; -inf of those of other ranks
    best: Tensor  # [n, k] largest logits, descending, at least one
    best_ids: Tensor  # [n, k] int32
    # Sums over all of the rank's tokens but the largest one, relative to it: beside 1, its own exponential, small ones
    # would be lost. [n, 1] each: exponentials; their products with the logits; exponentials of shared tokens, of which
    # the largest may be one.
    others: Tensor
    weighted: Tensor
    shared: Tensor


@torch.inference_mode()
def score_tokens(
    head: LmHead, hidden: Tensor, target_ids: Ints, request: ScoreRequest, candidate_ids: Ints | None = None
) -> Scores:
    """Score the sampled tokens with a whole head, and compute the other signals of the request.

    `hidden` is [sampled_tokens, width]. The sampled tokens `target_ids` are [sampled_tokens], and `candidate_ids`
    [sampled_tokens, k], where the request has given candidates.
    """
    ids = target_ids[:, None]
    if candidate_ids is not None and request.given_candidates:
        ids = np.concatenate([ids, candidate_ids], axis=1)
    layout = layout_of(request, ids.shape[1] - 1)
    records = score_positions(HeadShard.of(head), hidden, hidden[:, :0], torch.from_numpy(ids), layout)
    dtype = layout.dtype(STATE_DTYPES[_name(hidden.dtype)], hidden.shape[1], 0)
    return scores_in(records.cpu().numpy().reshape(-1).view(dtype))


@torch.inference_mode()
def score_positions(head: HeadShard, hidden: Tensor, layers: Tensor, ids: Tensor, layout: Layout) -> Tensor:
    """Score tokens, and return the records [n, bytes] of a layout; every rank returns the same.

    Args:
        head: this rank's part of the LM head.
        hidden: [n, width], on any device.
        layers: [n, any] values of other layers, which records may hold.
        ids: [n, 1 + given] the sampled tokens, and others to score.
        layout: what to return.
    """
    device, num_chunks = head.rows.weight.device, max(1, -(-len(hidden) // chunk_size(head.rows)))
    ids = merge_ids(ids.to(device, torch.int64), head.stop_class)
    pairs = zip(hidden.to(device).tensor_split(num_chunks), ids.tensor_split(num_chunks), strict=True)
    columns = torch.cat([_score_chunk(head, chunk, chunk_ids, layout) for chunk, chunk_ids in pairs])
    states = [states for states, is_wanted in ((hidden, layout.hidden), (layers, layout.layers)) if is_wanted]
    return torch.cat([columns, *(part.to(device).contiguous().view(torch.uint8) for part in states)], dim=-1)


def chunk_size(head: LmHead) -> int:
    """Return how many positions' logits may live at once."""
    logits = CHUNK_LOGITS if head.weight.device.type == "cpu" else GPU_CHUNK_LOGITS
    return max(MIN_CHUNK_TOKENS, logits // max(1, head.vocabulary_size))


def _score_chunk(head: HeadShard, hidden: Tensor, ids: Tensor, layout: Layout) -> Tensor:
    """Return the records [n, bytes] but for states."""
    logits = head.logits(hidden)
    logprobs, best, best_ids, entropy, shared = _combine(_gather(_part_of(head, logits, ids, layout), head.gather))
    is_known = ids < head.vocabulary_size
    if head.excluded_ids is not None:
        is_known &= ~torch.isin(ids, head.excluded_ids)
    columns = [logprobs.where(is_known, FLOOR)]
    if layout.top_k:
        columns += [best_ids.view(torch.float32), best]
    columns += [column for column, is_wanted in ((entropy, layout.entropy), (shared, layout.shared_mass)) if is_wanted]
    return torch.cat(columns, dim=-1).view(torch.uint8)


def _part_of(head: HeadShard, logits: Tensor, ids: Tensor, layout: Layout) -> Part:
    own_ids = ids - head.first
    is_own = (own_ids >= 0) & (own_ids < logits.shape[1])
    requested = logits.gather(-1, own_ids.where(is_own, 0)).where(is_own, -torch.inf)
    best, best_ids = largest_logits(logits, min(max(1, layout.top_k), logits.shape[1]))
    # In place from here on: a second tensor of this size costs more than the arithmetic.
    logits.sub_(best[:, :1]).scatter_(-1, best_ids[:, :1], ABSENT)
    weights = logits.exp() if layout.entropy else logits.exp_()
    others = weights.sum(dim=-1, keepdim=True)
    weighted, shared = torch.zeros_like(others), torch.zeros_like(others)
    if layout.shared_mass:
        assert head.shared is not None, "an engine hears which tokens are shared before it is asked for their mass"
        shared = weights @ head.shared[:, None] + head.shared[best_ids[:, :1]]
    if layout.entropy:
        weighted = weights.mul_(logits).sum(dim=-1, keepdim=True)
    return Part(requested, best, (best_ids + head.first).int(), others, weighted, shared)


def largest_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits of each row of [n, vocabulary], descending, and their places, as `topk` does.

    A group of logits that holds one of them is among the k groups with the largest maxima. So all logits are read once,
    for their groups' maxima, and a few of them once more.
    """
    rows, vocabulary = logits.shape
    num_groups = vocabulary // GROUP
    if logits.device.type == "cpu" and vocabulary <= MAX_SORTED and (k == 1 or vocabulary <= SORTED_PER_K * k):
        return _largest_by_numpy(logits, k)
    if vocabulary % GROUP or num_groups < 2 * k:
        return logits.topk(k, dim=-1)
    # Group g has the columns g, g + num_groups, ...: its maximum is taken over whole rows of memory at a time.
    groups = logits.view(rows, GROUP, num_groups).amax(1).topk(k, dim=-1).indices
    members = (groups[:, None, :] + num_groups * torch.arange(GROUP, device=logits.device)[:, None]).view(rows, -1)
    values, places = logits.gather(-1, members).topk(k, dim=-1)
    return values, members.gather(-1, places)


def _largest_by_numpy(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the same by numpy, which compares many numbers per instruction where torch does not: it sorts whole rows.

    A float64 has 29 bits more than a float32: the place lies in these, and numbers that differ keep their order.
    """
    if k == 1:
        places = torch.from_numpy(logits.numpy().argmax(axis=-1, keepdims=True))
        return logits.gather(-1, places), places
    keys = logits.double()
    bits = keys.view(torch.int64).bitwise_or_(torch.arange(logits.shape[1]))
    keys.numpy().sort(axis=-1)
    places = bits[:, -k:].flip(-1).bitwise_and_(MAX_SORTED - 1)
    return logits.gather(-1, places), places


def _gather(part: Part, gather: Callable[[Tensor], Tensor]) -> list[Part]:
    """Return every rank's part."""
    sizes = [tensor.shape[1] for tensor in part]
    of_all = gather(torch.cat([tensor.view(torch.float32) for tensor in part], dim=-1))  # the ids' bits
    parts = (Part(*of_rank.split(sizes, dim=-1)) for of_rank in of_all.split(sum(sizes), dim=-1))
    return [of_rank._replace(best_ids=of_rank.best_ids.view(torch.int32)) for of_rank in parts]


def _combine(parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """Return what the parts of all ranks say together.

    Returns:
        Log-probabilities [n, 1 + given] of the requested ids; those of the most likely tokens, and these, [n, k] each;
        the entropy, and the probability of the shared tokens, [n, 1] each.
    """
    [first] = parts[:1]
    best, best_ids = first.best, first.best_ids
    if len(parts) > 1:
        best, places = torch.cat([part.best for part in parts], -1).topk(first.best.shape[1], dim=-1)
        best_ids = torch.cat([part.best_ids for part in parts], -1).gather(-1, places)
    largest = best[:, :1]
    others, weighted, shared = (torch.zeros_like(largest) for _ in range(3))
    for part in parts:
        below = part.best[:, :1] - largest
        scale = below.exp()
        is_largest = part.best_ids[:, :1] == best_ids[:, :1]
        others += scale * (part.others + (~is_largest).float())
        weighted += scale * (part.weighted + below * (1 + part.others))
        shared += scale * part.shared
    requested = torch.stack([part.requested for part in parts]).amax(0)
    log_total = others.log1p()
    # Twice subtracted: the sum of the two would round what is left of large logits.
    logprobs, best = requested - largest - log_total, best - largest - log_total
    return logprobs, best, best_ids.contiguous(), log_total - weighted / (1 + others), shared / (1 + others)


def _name(dtype: torch.dtype) -> Dtype:
    name: Any = str(dtype).removeprefix("torch.")
    return name
