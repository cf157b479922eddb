"""Says what a scoring model reads of each trajectory: the student's prompt, or its own, before the same completion."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cluster.contracts.columns import Ints, Ragged, ragged
from cluster.contracts.trajectory import (
    generated_schema,
    list_column,
    prompt_field,
    prompted_models_in,
)


def as_read_by(batch: pa.RecordBatch, model: str) -> tuple[Ragged, Ragged]:
    """Return `token_ids` and `loss_mask` as a scoring model reads them; `model` is its role in the target.

    Where the row has a prompt for the model, this stands in the place of all tokens before the first sampled one; the
    others follow as they are, so the sampled tokens stay the same and are as many. Positions count from the model's
    own prompt on.

    Example:
        >>> from cluster.contracts.trajectory import make_generated
        >>> from tests.builders import make_trajectory
        >>> row = make_trajectory((1, 2), (3, 4), scorer_prompts={"teacher": np.array([7, 8, 9], np.int32)})
        >>> tokens, mask = as_read_by(make_generated([row]), "teacher")
        >>> tokens[0].tolist(), mask[0].tolist()
        ([7, 8, 9, 3, 4], [0, 0, 0, 1, 1])
    """
    token_ids, loss_mask = ragged(batch, "token_ids"), ragged(batch, "loss_mask")
    if model not in prompted_models_in(batch.schema):
        return token_ids, loss_mask
    prompts = ragged(batch, prompt_field(model).name)
    ids, masks = [np.empty(0, np.int32)], [np.empty(0, np.uint8)]
    for row in range(len(token_ids)):
        prompt, tokens, mask = prompts[row], token_ids[row], loss_mask[row]
        if len(prompt) and mask.any():
            first = int(mask.argmax())
            tokens = np.concatenate([prompt, tokens[first:]])
            mask = np.concatenate([np.zeros(len(prompt), np.uint8), mask[first:]])
        ids.append(tokens)
        masks.append(mask)
    offsets = np.cumsum([0, *(len(mask) for mask in masks[1:])], dtype=np.int64)
    return Ragged(np.concatenate(ids), offsets), Ragged(np.concatenate(masks), offsets)


def rows_with_prompts(batch: pa.RecordBatch, model: str) -> Ints:
    """Return the rows that have sampled tokens and a prompt of the scoring model's own."""
    if model not in prompted_models_in(batch.schema):
        return np.empty(0, np.int32)
    prompts, sampled = ragged(batch, prompt_field(model).name), ragged(batch, "rollout_logprobs")
    return np.flatnonzero((prompts.lengths > 0) & (sampled.lengths > 0)).astype(np.int32)


def to_score_again(
    batch: pa.RecordBatch, rows: Ints, prompted_models: Sequence[str], candidate_ids: Ints | None = None
) -> pa.RecordBatch:
    """Return some rows as they were generated, to be scored once more.

    They have prompts for `prompted_models` alone, and these candidates, [completion_tokens of the rows, k], or none.
    """
    chosen = batch.take(pa.array(rows))
    schema = generated_schema(0 if candidate_ids is None else candidate_ids.shape[1], prompted_models)
    columns = {field.name: chosen[field.name] for field in schema if field.name in batch.schema.names}
    if candidate_ids is not None:
        offsets = pa.array(ragged(chosen, "rollout_logprobs").offsets.astype(np.int32))
        zeros = np.zeros(candidate_ids.shape, np.float32)  # no sampler has said anything of them
        columns["candidate_ids"] = list_column(offsets, candidate_ids)
        columns["candidate_rollout_logprobs"] = list_column(offsets, zeros)
    return pa.record_batch([columns[field.name] for field in schema], schema=schema)
