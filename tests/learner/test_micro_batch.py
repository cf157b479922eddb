"""The grid of a micro-batch and its flat columns."""

import numpy as np
import pytest
import torch

from cluster.contracts.errors import TrajectoryError
from cluster.contracts.trajectory import scored_schema
from learner.micro_batch import Trajectory, build_micro_batch, trajectories
from tests.learner.support import TOP_K, make_scored


def trajectory(token_ids, loss_mask):
    completion = [token for token, mask in zip(token_ids, loss_mask, strict=True) if mask]
    logprobs = -np.array(completion, np.float32)
    return Trajectory(
        token_ids=np.array(token_ids, np.int32),
        loss_mask=np.array(loss_mask, np.uint8),
        rollout_logprobs=logprobs,
        teacher_logprobs=logprobs / 2,
        teacher_topk_ids=np.array(completion, np.int32)[:, None],
        teacher_topk_logprobs=logprobs[:, None],
    )


def test_positions_restart_with_every_trajectory_and_are_zero_at_padding():
    rows = [trajectory([10, 11, 12], [0, 1, 1]), trajectory([20, 21], [0, 1]), trajectory([30, 31, 32], [0, 0, 1])]
    batch = build_micro_batch(((0, 1), (2,)), rows, top_k=1)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 31, 32, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]


def test_every_completion_token_is_predicted_from_the_place_to_its_left():
    rows = [trajectory([10, 11, 12], [0, 1, 1]), trajectory([20, 21], [0, 1]), trajectory([30, 31, 32], [0, 0, 1])]
    batch = build_micro_batch(((0, 1), (2,)), rows, top_k=1)
    assert batch.predicting.tolist() == [0, 1, 3, 6]
    assert batch.target_ids.tolist() == [11, 12, 21, 32]
    assert batch.rollout_logprobs.tolist() == [-11, -12, -21, -32]
    assert batch.teacher_logprobs.tolist() == [-5.5, -6, -10.5, -16]
    assert batch.teacher_topk_ids.tolist() == [[11], [12], [21], [32]]


def test_tokens_between_two_completions_are_not_targets():
    batch = build_micro_batch(((0,),), [trajectory([10, 11, 12, 13], [0, 1, 0, 1])], top_k=1)
    assert batch.target_ids.tolist() == [11, 13]
    assert batch.predicting.tolist() == [0, 2]


def test_an_empty_grid_is_one_pad_token_and_no_completion_tokens():
    batch = build_micro_batch((), [], top_k=3)
    assert batch.input_ids.shape == (1, 1)
    assert batch.num_completion_tokens == 0
    assert batch.teacher_topk_ids.shape == (0, 3)


def test_rows_of_several_batches_come_in_order(scored):
    rows = trajectories([scored.slice(0, 2), scored.slice(2)])
    assert [len(row.token_ids) for row in rows] == [12, 35, 3, 28, 48, 13, 13]
    np.testing.assert_array_equal(rows[3].teacher_topk_ids, np.array(scored["teacher_topk_ids"][3].as_py()))


def test_batches_with_different_widths_of_topk_are_refused(scored):
    other = scored_schema(TOP_K + 1).empty_table().to_batches() or [make_scored([(1, 1)])]
    narrow = other[0].replace_schema_metadata({**other[0].schema.metadata, b"top_k": b"9"})
    with pytest.raises(TrajectoryError, match=r"different widths \[8, 9\]"):
        trajectories([scored, narrow])


def test_moving_to_a_device_keeps_every_column(scored):
    batch = build_micro_batch(((0,),), trajectories([scored]), TOP_K)
    assert torch.equal(batch.to(torch.device("cpu")).target_ids, batch.target_ids)
