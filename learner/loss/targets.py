"""Mixes models into the target of a term: the sum of coefficient times log-probability, then normalised.

One model of coefficient 1 is its own target. Otherwise the normaliser runs over what is compared:

- sampled tokens have none, for a constant of the position is a baseline in a policy gradient; with a discount it is
  none for the tokens before, and the optimum is the mixture of whole texts, normalised over texts;
- renormalised candidates are normalised over themselves, which is exact;
- candidates with a tail, generalized ones, and those of a policy gradient over the student's candidates are normalised
  over candidates and tail, each model's tail being mixed like a token. That is exact where the coefficients sum to 1
  and the models agree on how the tail's tokens compare. A sampled token that stands for the tail takes the same
  normaliser, or the parts would not add up;
- the whole vocabulary is normalised exactly.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cluster.models.stop_class import EXCLUDED_LOGIT
from learner.loss.divergences import LOWEST_LOGPROB, to_buckets


def log_linear(target: Mapping[str, float], logprobs: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of coefficient times log-probability, not normalised; -inf scores count as LOWEST_LOGPROB."""
    terms = [share * logprobs[model].clamp(min=LOWEST_LOGPROB) for model, share in target.items() if share]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def target_buckets(
    target: Mapping[str, float], logprobs: Mapping[str, Tensor], inside: Tensor | None, truncation: str
) -> Tensor:
    """Return the target's log-probabilities of the buckets that `to_buckets` makes of the student's."""
    if truncation == "renormalized" or is_one_model(target):
        return to_buckets(log_linear(target, logprobs), inside, truncation)
    buckets = _mixed_buckets(target, logprobs, inside).log_softmax(-1)
    return buckets if truncation == "tail" else buckets[..., :-1]


def log_normaliser(target: Mapping[str, float], logprobs: Mapping[str, Tensor], inside: Tensor | None) -> Tensor:
    """Return what `target_buckets` takes off the mixture's log-probabilities to normalise candidates and tail, [n]."""
    buckets = _mixed_buckets(target, logprobs, inside)
    return torch.zeros_like(buckets[..., 0]) if is_one_model(target) else buckets.logsumexp(-1)


def _mixed_buckets(target: Mapping[str, float], logprobs: Mapping[str, Tensor], inside: Tensor | None) -> Tensor:
    tails = {model: to_buckets(logprobs[model].clamp(min=LOWEST_LOGPROB), inside, "tail")[..., -1:] for model in target}
    candidates = to_buckets(log_linear(target, logprobs), inside, "generalized")
    return torch.cat([candidates, log_linear(target, tails)], dim=-1)


def is_one_model(target: Mapping[str, float]) -> bool:
    """Return whether the target is just the distribution of one model."""
    return [share for share in target.values() if share] == [1.0]


def mixed_logits(target: Mapping[str, float], model_logits: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
    """Return the target's logits, not normalised: those of its one model, or a mixture; out None: in its memory."""
    (first, share), *others = [(model, share) for model, share in target.items() if share]
    logits = model_logits[first]
    if is_one_model(target):
        return logits
    # Ids without a probability: a difference of models would make one of what none of them has.
    without = logits <= EXCLUDED_LOGIT / 2 if sum(target.values()) <= 0 else None
    mixed = logits.float().mul_(share) if out is None else torch.mul(logits, share, out=out)
    for model, of_model in others:
        mixed.add_(model_logits[model], alpha=of_model)
    return mixed if without is None else mixed.masked_fill_(without, EXCLUDED_LOGIT)
