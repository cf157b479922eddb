"""Samples candidates from the distribution that a sampled token came from, and keeps them until they are fetched.

Candidates are independent and with replacement, by inverting the cumulative distribution at uniform numbers that depend
only on the request's seed and the position. They therefore repeat with the seed, whatever else is in the batch, and
when a position is computed again, candidates from its new distribution replace the old ones.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.contracts.trajectory import Floats, Ints

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64 (Steele, Lea and Flood 2014): added before each output
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Not 53: the product of a total and 1 - 2**-53 may be rounded up to the total, which lies beyond every token.
UNIFORM_BITS = 52
MAX_LOGITS_AT_ONCE = 1 << 24  # bounds the copy of logits to 64 MiB
LEAST_IN_BLOCKS = 1 << 12  # tokens of a vocabulary whose blocks are summed up first; below, more calls cost more
MAX_STEPS_ON_DEVICE = 64  # waits for a GPU once in so many steps, and when candidates are fetched


@dataclass(frozen=True)
class CandidateRequest:
    """Says how many candidates per position a request wants, and from which random numbers."""

    key: str  # its name when the candidates are fetched
    count: int
    seed: int  # in [0, 2**63)


class Step:
    """Holds the candidates of one step of the model, for the rows of several requests."""

    def __init__(self, ids: Tensor, logprobs: Tensor) -> None:
        self.ids: NDArray[Any] | Tensor = ids  # [rows, largest count]
        self.logprobs: NDArray[Any] | Tensor = logprobs  # [rows, largest count]


@dataclass
class SampledCandidates:
    """Finds the candidates of one request by position; a step lives as long as a request that has candidates in it."""

    request: CandidateRequest
    places: dict[int, tuple[Step, int]] = field(default_factory=dict)

    def gather(self, num_tokens: int) -> tuple[Ints, Floats]:
        """Return ids and log-probabilities [tokens, count], as far as no position is missing."""
        places = [self.places[position] for position in takewhile(self.places.__contains__, range(num_tokens))]
        none = np.empty((0, self.request.count))
        ids = np.vstack([none, *(step.ids[row, : self.request.count] for step, row in places)])
        logprobs = np.vstack([none, *(step.logprobs[row, : self.request.count] for step, row in places)])
        return ids.astype(np.int32), logprobs.astype(np.float32)


class LogitsRow(NamedTuple):
    """Locates a request's next token in a step's logits."""

    candidates: SampledCandidates
    row: int  # of the logits
    position: int  # number of tokens sampled for the request before
    temperature: float  # by which the logits are yet to be divided


class CandidateLog:
    """Samples candidates at each step of the model, and keeps those of every request."""

    def __init__(self) -> None:
        self._requests: dict[str, SampledCandidates] = {}
        self._on_device: list[Step] = []

    def __len__(self) -> int:
        return len(self._requests)

    def open(self, request: CandidateRequest) -> SampledCandidates:
        """Return where a request's candidates go; a request that was interrupted finds those it has."""
        return self._requests.setdefault(request.key, SampledCandidates(request))

    def record(self, rows: Sequence[LogitsRow], logits: Tensor) -> None:
        """Sample for some rows of the logits [any, vocabulary]; does not wait for a GPU."""
        rows_at_once = max(1, MAX_LOGITS_AT_ONCE // logits.shape[-1])
        for first in range(0, len(rows), rows_at_once):
            some = rows[first : first + rows_at_once]
            step = Step(*_sample_rows(some, logits))
            self._on_device.append(step)
            for place, row in enumerate(some):
                row.candidates.places[row.position] = (step, place)
        if len(self._on_device) >= MAX_STEPS_ON_DEVICE:
            self._to_host()

    def take(self, key: str, num_tokens: int) -> tuple[Ints, Floats] | None:
        """Forget a request and return its candidates at the tokens that were kept; None if it is not known."""
        self._to_host()
        candidates = self._requests.pop(key, None)
        return None if candidates is None else candidates.gather(num_tokens)

    def drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._requests.pop(key, None)

    def _to_host(self) -> None:
        """Wait for the device, once for all steps, and let go of its memory."""
        if self._on_device:
            for name in ("ids", "logprobs"):
                values = [getattr(step, name) for step in self._on_device]
                parts = (
                    torch.cat([value.flatten() for value in values]).cpu().split([value.numel() for value in values])
                )
                for step, value, part in zip(self._on_device, values, parts, strict=True):
                    setattr(step, name, part.view_as(value).numpy())
        self._on_device.clear()


def _sample_rows(rows: Sequence[LogitsRow], logits: Tensor) -> tuple[Tensor, Tensor]:
    def on_device(values: Any) -> Tensor:
        return torch.as_tensor(values).to(logits.device, non_blocking=True)

    seeds = np.array([row.candidates.request.seed for row in rows], np.uint64)
    positions = np.array([row.position for row in rows], np.uint64)
    count = max(row.candidates.request.count for row in rows)
    places, numbers = on_device([row.row for row in rows]), on_device(uniforms(seeds, positions, count))
    temperatures = [row.temperature for row in rows]
    divisors = None if set(temperatures) == {1.0} else on_device(temperatures).unsqueeze(-1)
    return sample(logits, numbers, places, divisors)


def sample(
    logits: Tensor, uniform: Tensor, places: Tensor | None = None, temperatures: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample tokens with replacement from softmax(logits / temperatures).

    Args:
        logits: [any, vocabulary] float32; minus infinity is never sampled.
        uniform: [rows, count] float64 in [0, 1).
        places: [rows] rows of the logits; None: all of them.
        temperatures: [rows, 1]; None: 1.

    Returns:
        ids [rows, count] int32, and their log-probabilities [rows, count] float32.
    """
    vocabulary = logits.shape[-1]
    size = vocabulary if vocabulary < LEAST_IN_BLOCKS else 1 << (vocabulary.bit_length() + 1) // 2
    weights = logits.new_empty(len(uniform), -(-vocabulary // size) * size)  # in memory once: all else is in place
    of_tokens = weights[:, :vocabulary]
    if places is None:
        of_tokens.copy_(logits)
    else:
        torch.index_select(logits, 0, places, out=of_tokens)
    of_tokens.sub_(of_tokens.amax(-1, keepdim=True))
    if temperatures is not None:
        of_tokens.div_(temperatures)
    of_tokens.exp_()
    weights[:, vocabulary:] = 0
    ids, probabilities = (_find if size == vocabulary else _find_in_blocks)(weights.unflatten(-1, (-1, size)), uniform)
    return ids.int(), probabilities.log().float()


def _find(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ids at which the cumulative distribution of weights [rows, 1, vocabulary] passes the numbers.

    The second value is their probabilities; both are [rows, count].
    """
    weights = weights.squeeze(1)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The first token whose cumulative weight lies above; one of weight 0 never lies above its predecessor.
    ids = torch.searchsorted(cumulative, uniform * total, right=True)
    return ids, weights.gather(-1, ids) / total


def _find_in_blocks(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for weights [rows, blocks, size], and sum up in float64 only inside the blocks that are found."""
    size = weights.shape[-1]
    sums = weights.sum(-1).double()  # [rows, blocks]
    ends = sums.cumsum(-1)
    total = ends[:, -1:]
    numbers = uniform * total
    blocks = torch.searchsorted(ends, numbers, right=True)  # [rows, count]
    inside = weights.gather(1, blocks.unsqueeze(-1).expand(-1, -1, size))  # [rows, count, size]
    numbers = (numbers - (ends - sums).gather(-1, blocks)).clamp_(min=0)  # from the start of the block
    cumulative = inside.cumsum(-1, dtype=torch.float64)
    # Sums that are rounded otherwise may leave a number beyond the last token of its block that can be sampled.
    last = torch.searchsorted(cumulative, cumulative[..., -1:].contiguous())
    within = torch.searchsorted(cumulative, numbers.unsqueeze(-1), right=True).minimum(last)
    return blocks * size + within.squeeze(-1), inside.gather(-1, within).squeeze(-1) / total


def uniforms(seeds: NDArray[np.uint64], positions: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return [rows, count] numbers in [0, 1), by SplitMix64 with one stream per pair of seed [rows], position [rows].

    Example:
        >>> one, other = uniforms(np.array([7, 7], np.uint64), np.array([0, 1], np.uint64), 2)
        >>> bool((one == other).any())
        False
    """
    streams = scramble(scramble(seeds) + positions * np.uint64(GOLDEN_GAMMA))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    bits = scramble(streams[:, None] + steps) >> np.uint64(64 - UNIFORM_BITS)
    return bits.astype(np.float64) * 2.0**-UNIFORM_BITS


def scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output of each state."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(MULTIPLIERS[0])
    state = (state ^ (state >> np.uint64(27))) * np.uint64(MULTIPLIERS[1])
    return state ^ (state >> np.uint64(31))
