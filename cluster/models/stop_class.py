"""Makes one token of all ids that end a completion, which alone count: which of them a model prefers is its habit.

A student and a teacher that end their turns by different ids would pull the student away from its own before it writes
the teacher's, and completions would grow (arXiv 2609.20511). The class is a tuple of ids; the first stands for all.
Whatever reads logits reads them after `merge_logits`: sampler, teachers, and the student that learns. So the written
id, log-probabilities, candidates, entropies and divergences are those of a vocabulary with a single stop token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

EXCLUDED_LOGIT = -1e6  # finite, for 0 times -inf is no entropy; float32 still has its distance to any other logit


def merge_logits(logits: Tensor, stop_class: Sequence[int], rows: Tensor | None = None) -> Tensor:
    """Give the first id of the class the probability of all, and the others none, in the logits' memory.

    Args:
        logits: [n, vocabulary].
        stop_class: ids of the vocabulary, at least one.
        rows: [n] bool, which rows; None: all.

    Returns:
        [n, ids] each id's share of the class, which `split_gradient` needs.
    """
    members = torch.stack([logits[:, token_id] for token_id in stop_class], dim=-1)
    total = members.logsumexp(-1)
    if rows is not None:
        total = torch.where(rows, total, members[:, 0])
    logits[:, stop_class[0]] = total
    for token_id in stop_class[1:]:
        if rows is None:
            logits[:, token_id] = EXCLUDED_LOGIT
        else:
            logits[:, token_id].masked_fill_(rows, EXCLUDED_LOGIT)
    return (members - total[:, None]).exp_()


def split_gradient(gradient: Tensor, stop_class: Sequence[int], shares: Tensor) -> None:
    """Turn the gradient by merged logits into that by the model's own, in its memory; `shares` are `merge_logits`'s.

    The derivative of a class's logit, the logarithm of a sum, by each id's is that id's share.
    """
    of_class = gradient[:, stop_class[0]].clone()
    for column, token_id in enumerate(stop_class):
        gradient[:, token_id] = of_class * shares[:, column]


def merge_ids(token_ids: Tensor, stop_class: Sequence[int]) -> Tensor:
    """Return ids of any shape in which the class's first id stands for all of them.

    Example:
        >>> merge_ids(torch.tensor([5, 7, 1]), (1, 7))
        tensor([5, 1, 1])
    """
    for token_id in stop_class[1:]:
        token_ids = torch.where(token_ids == token_id, stop_class[0], token_ids)
    return token_ids
