"""Lays the trajectories of one micro-batch out in a grid of tokens, with flat completion columns beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.contracts.errors import TrajectoryError
from cluster.contracts.trajectory import Ragged, ragged, top_k_of
from learner.packing import Grid

PAD_TOKEN_ID = 0  # any id of the vocabulary: no completion token attends to it


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of one rank.

    `position_ids` restart at 0 with every trajectory and are 0 at padding, so every pad is a segment of its own:
    transformers builds the block-causal mask from the positions when it is given no attention mask. Completion tokens
    come in grid order.
    """

    input_ids: Tensor  # [rows, row_length] int64
    position_ids: Tensor  # [rows, row_length] int64
    predicting: Tensor  # [completion_tokens] int64: place in the flattened grid whose hidden state predicts the token
    target_ids: Tensor  # [completion_tokens] int64
    rollout_logprobs: Tensor  # [completion_tokens] float32
    teacher_logprobs: Tensor  # [completion_tokens] float32
    teacher_topk_ids: Tensor  # [completion_tokens, k] int64; k is 0 with the `sampled` signal
    teacher_topk_logprobs: Tensor  # [completion_tokens, k] float32

    @property
    def num_completion_tokens(self) -> int:
        """Return how many tokens the student sampled."""
        return len(self.target_ids)

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same micro-batch on a device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Trajectory:
    """The columns of one scored trajectory that the learner needs, as views."""

    token_ids: np.ndarray  # [tokens]
    loss_mask: np.ndarray  # [tokens]
    rollout_logprobs: np.ndarray  # [completion_tokens]
    teacher_logprobs: np.ndarray  # [completion_tokens]
    teacher_topk_ids: np.ndarray  # [completion_tokens, k]
    teacher_topk_logprobs: np.ndarray  # [completion_tokens, k]


def trajectories(batches: Sequence[pa.RecordBatch]) -> list[Trajectory]:
    """View all rows of scored batches, in order.

    Raises:
        TrajectoryError: the batches' top-k columns differ in width.
    """
    widths = {top_k_of(batch) for batch in batches}
    if len(widths) > 1:
        raise TrajectoryError(
            f"learner: batches of one step carry top-k columns of different widths {sorted(widths)}; "
            "give every teacher the same signal and top_k"
        )
    return [row for batch in batches for row in _rows(batch)]


def build_micro_batch(grid: Grid, rows: Sequence[Trajectory], top_k: int) -> MicroBatch:
    """Lay the grid's trajectories out; an empty grid becomes one pad token and no completion tokens."""
    row_length = max([1, *(sum(len(rows[index].token_ids) for index in grid_row) for grid_row in grid)])
    shape = (max(1, len(grid)), row_length)
    input_ids = np.full(shape, PAD_TOKEN_ID, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    predicting = []
    for row, grid_row in enumerate(grid):
        start = 0
        for index in grid_row:
            length = len(rows[index].token_ids)
            input_ids[row, start : start + length] = rows[index].token_ids
            position_ids[row, start : start + length] = np.arange(length)
            # The hidden state one place to the left of a token predicts it.
            predicting.append(row * row_length + start + np.flatnonzero(rows[index].loss_mask) - 1)
            start += length
    placed = [rows[index] for grid_row in grid for index in grid_row]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        predicting=_join(predicting, np.int64),
        target_ids=_join([row.token_ids[row.loss_mask != 0] for row in placed], np.int64),
        rollout_logprobs=_join([row.rollout_logprobs for row in placed], np.float32),
        teacher_logprobs=_join([row.teacher_logprobs for row in placed], np.float32),
        teacher_topk_ids=_join([row.teacher_topk_ids for row in placed], np.int64, top_k),
        teacher_topk_logprobs=_join([row.teacher_topk_logprobs for row in placed], np.float32, top_k),
    )


def _rows(batch: pa.RecordBatch) -> list[Trajectory]:
    per_token = [ragged(batch, "token_ids"), ragged(batch, "loss_mask")]
    per_completion_token = [ragged(batch, "rollout_logprobs"), ragged(batch, "teacher_logprobs")]
    if top_k_of(batch):
        topk = [ragged(batch, "teacher_topk_ids"), ragged(batch, "teacher_topk_logprobs")]
    else:
        offsets = per_completion_token[0].offsets
        topk = [Ragged(np.empty((int(offsets[-1]), 0), dtype), offsets) for dtype in (np.int32, np.float32)]
    columns = [*per_token, *per_completion_token, *topk]
    return [Trajectory(*(column[row] for column in columns)) for row in range(batch.num_rows)]


def _join(parts: Sequence[np.ndarray], dtype: type, width: int | None = None) -> Tensor:
    empty: NDArray[Any] = np.empty((0,) if width is None else (0, width), dtype)
    return torch.from_numpy(np.concatenate([empty, *parts]).astype(dtype, copy=False))
