"""Adds up what a student gives to all tokens but the candidates, where these leave too little to see.

Float32 log-probabilities of the candidates leave the rest known to about 1e-6 of 1. In rows where it seems to be less,
it comes from the tokens themselves, and its gradient goes to them.
"""

import torch
from torch import Tensor

from learner.loss.divergences import LOWEST_LOGPROB, is_tail_floored
from learner.loss.softmax import FusedSoftmax, Softmax, rows_at_once


def find_log_tail(softmax: Softmax | FusedSoftmax, candidates: Tensor, inside: Tensor | None) -> Tensor | None:
    """Return the logarithms of the tails that candidates [n, k] leave, [n], and 0 in rows that leave enough to see.

    None if all rows do. `softmax` was asked for the sampled tokens and the candidates; `inside`, [n, k], says which of
    these take part, None being all.
    """
    if not candidates.shape[-1]:
        return None
    rows = is_tail_floored(softmax.logprobs[:, 1:], inside).nonzero()[:, 0]
    if not len(rows):
        return None
    log_tail = torch.zeros_like(softmax.logprobs[:, 0])
    for some in rows.split(rows_at_once(softmax.of_rows(rows[:1]))):
        probabilities = softmax.of_rows(some)
        row, column = _taking_part(candidates[some], inside if inside is None else inside[some])
        probabilities[row, candidates[some[row], column]] = 0
        log_tail[some] = probabilities.sum(-1).log().clamp(min=LOWEST_LOGPROB)
    return log_tail


def gradient_with_tail(
    softmax: Softmax | FusedSoftmax,
    ids: Tensor,
    inside: Tensor | None,
    of_ids: Tensor,
    log_tail: Tensor,
    of_tail: Tensor,
) -> Tensor:
    """Turn the gradients by log-probabilities of ids [n, 1 + k] and of tails [n] into that by all logits.

    The tail's log-probability has the derivative p(v) / tail - p(v) by the logit of a token in it, and -p(v) by that of
    a candidate. The two are written apart: as a difference, little would be left of the candidates'.
    """
    total = -(of_ids.sum(-1) + of_tail)
    rows, candidates = log_tail.nonzero()[:, 0], ids[:, 1:]
    row, column = _taking_part(candidates[rows], inside if inside is None else inside[rows])
    row = rows[row]
    of_candidates = softmax.logprobs[row, 1 + column].exp() * total[row]
    by_logits = softmax.multiplied(total + of_tail * (-log_tail).exp())
    by_logits[row, candidates[row, column]] = of_candidates
    return by_logits.scatter_add_(-1, ids, of_ids)


def _taking_part(candidates: Tensor, inside: Tensor | None) -> tuple[Tensor, ...]:
    """Return the rows and columns of the candidates [m, k] that take part."""
    return (torch.ones_like(candidates) if inside is None else inside).nonzero(as_tuple=True)
