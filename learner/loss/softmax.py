"""Makes its passes over logits in blocks of rows, with the same scratch memory for every block.

On a CPU a block stays in the cache, and scratch that is allocated anew for every block costs more in page faults than
the arithmetic does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.loss.divergences import LOWEST_LOGPROB
from learner.loss.kernels.interface import Normaliser, RowKernels

CPU_BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: a few blocks fit the shared cache, and every thread has a row
GPU_BLOCK_ELEMENTS = 1 << 27  # 512 MiB of float32: bounds the scratch; launches no longer matter
GROUP = 128  # logits per group in the search for the k-th largest


@dataclass(frozen=True)
class Softmax:
    """Holds the student's probabilities, and what was read off on the way to them."""

    probabilities: Tensor  # [n, vocabulary], in the memory of the logits
    logprobs: Tensor  # [n, ids] of the tokens asked for
    entropy: Tensor  # [n] in nats

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return all probabilities of some rows, by index, in memory of their own."""
        return self.probabilities[rows]

    def multiplied(self, factors: Tensor) -> Tensor:
        """Return the probabilities times a factor per row, in their memory."""
        return self.probabilities.mul_(factors[:, None])

    def gradient(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Turn the gradient by log-probabilities of ids [n, m] into that by all logits, in the probabilities' memory.

        A log-probability's derivative by the logits is its one-hot vector minus the probabilities.
        """
        return self.multiplied(-gradient.sum(-1)).scatter_add_(-1, ids, gradient)


@dataclass(frozen=True)
class FusedSoftmax:
    """Holds what kernels read off logits; the probabilities are written as a part of the gradient only."""

    kernels: RowKernels
    logits: Tensor  # [n, vocabulary]
    whole: Normaliser
    logprobs: Tensor  # [n, ids] of the tokens asked for
    entropy: Tensor  # [n] in nats

    def of_rows(self, rows: Tensor) -> Tensor:
        """Return all probabilities of some rows, by index, in memory of their own."""
        return Normaliser(self.whole.peak[rows], self.whole.log_sum[rows]).logprobs(self.logits[rows]).exp_()

    def multiplied(self, factors: Tensor) -> Tensor:
        """Return the probabilities times a factor per row, in the logits' memory."""
        self.kernels.write_probabilities(self.logits, self.whole, factors)
        return self.logits

    def gradient(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Turn the gradient by log-probabilities of ids [n, m] into that by all logits, in their memory."""
        return self.multiplied(-gradient.sum(-1)).scatter_add_(-1, ids, gradient)


def softmax_of(logits: Tensor, ids: Tensor) -> Softmax:
    """Overwrite the logits by their probabilities, and read off the log-probabilities of ids [n, m] and the entropy."""
    logprobs, entropy = logits.new_empty(ids.shape), logits.new_empty(len(logits))
    blocks = row_blocks(logits)
    scratch = torch.empty_like(logits[blocks[0]])
    for rows in blocks:
        block = log_softmax(logits[rows], scratch)
        torch.gather(block, -1, ids[rows], out=logprobs[rows])
        torch.exp(block, out=logits[rows])
        entropy[rows] = -torch.linalg.vecdot(logits[rows], block)
    return Softmax(logits, logprobs, entropy)


def any_softmax(logits: Tensor, ids: Tensor, kernels: RowKernels | None) -> Softmax | FusedSoftmax:
    """Return `softmax_of`, by kernels if there are some that take the logits."""
    if kernels is None or not kernels.takes(logits):
        return softmax_of(logits, ids)
    statistics = kernels.statistics(logits)
    whole = statistics.whole
    return FusedSoftmax(kernels, logits, whole, whole.logprobs(logits.gather(-1, ids)), statistics.entropy)


def read_tokens(logits: Tensor, target_ids: Tensor, kernels: RowKernels | None = None) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of sampled tokens [n] and entropies [n]; float32 logits are overwritten."""
    softmax = any_softmax(at_least_float32(logits), target_ids[:, None], kernels)
    return softmax.logprobs[:, 0], softmax.entropy


def temperature_normaliser(logits: Tensor, temperature: float) -> Tensor:
    """Return N, [n], with log p_T = log p / T - N for the probabilities p_T at a temperature T; 0 where T is 1."""
    normaliser = logits.new_zeros(len(logits))
    if temperature == 1:
        return normaliser
    for rows in row_blocks(logits):
        below = logits[rows] - logits[rows].amax(-1, keepdim=True)
        normaliser[rows] = (below / temperature).logsumexp(-1) - below.logsumexp(-1) / temperature
    return normaliser


def kth_largest(logits: Tensor, k: int) -> Tensor:
    """Return the k-th largest logit of each row, [n]; `topk` over the whole vocabulary is many times slower on a CPU.

    The k largest lie in the k groups with the largest maxima, or are matched there by equal values.
    """
    num_rows, vocabulary = logits.shape
    num_groups = vocabulary // GROUP
    if num_groups <= k:
        return logits.topk(min(k, vocabulary), dim=-1).values[:, -1]
    grouped = logits[:, : num_groups * GROUP].unflatten(-1, (num_groups, GROUP))
    best = grouped.amax(-1).topk(k, dim=-1, sorted=False).indices
    members = grouped.gather(1, best[..., None].expand(num_rows, k, GROUP)).flatten(1)
    return torch.cat([members, logits[:, num_groups * GROUP :]], dim=-1).topk(k, dim=-1).values[:, -1]


def log_softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Write log-probabilities, at least LOWEST_LOGPROB, into the first rows of out and return these."""
    logprobs = out[: len(logits), : logits.shape[-1]]
    return torch.log_softmax(logits, -1, out=logprobs).clamp_(min=LOWEST_LOGPROB)


def row_blocks(values: Tensor) -> list[slice]:
    """Cut the rows of [n, vocabulary] into blocks, the first being the largest; at least one, if an empty one."""
    size = rows_at_once(values)
    return [slice(start, min(start + size, len(values))) for start in range(0, max(1, len(values)), size)]


def rows_at_once(values: Tensor) -> int:
    """Return how many rows of [n, vocabulary] a block has."""
    elements = CPU_BLOCK_ELEMENTS if values.device.type == "cpu" else GPU_BLOCK_ELEMENTS
    return max(1, elements // values.shape[-1])


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values in float32, or in float64 where they have it."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
