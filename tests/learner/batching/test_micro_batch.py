"""The grid of a micro-batch and its flat columns."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster.contracts.errors import TrajectoryError
from learner.batching.micro_batch import Trajectory, build_micro_batch, trajectories, uniform_numbers
from tests.learner.support import OBJECTIVES, make_scored, random_heads


def trajectory(token_ids, loss_mask, route="only", **columns):
    completion = [token for token, mask in zip(token_ids, loss_mask, strict=True) if mask]
    logprobs = -np.array(completion, np.float32)
    found = Trajectory(
        trajectory_id=token_ids[0],
        route=route,
        task_advantage=token_ids[0] / 10,
        token_ids=np.array(token_ids, np.int32),
        loss_mask=np.array(loss_mask, np.uint8),
        rollout_logprobs=logprobs,
        candidate_ids=np.array(completion, np.int32)[:, None] + 1,
        candidate_rollout_logprobs=logprobs[:, None][:, :0],
        scores={
            model: {"logprobs": logprobs / divisor, "candidate_logprobs": logprobs[:, None] / divisor}
            for model, divisor in {"teacher": 2, "base": 4}.items()
        },
        wide_scores={},
    )
    return replace(found, **columns)


@pytest.fixture
def rows():
    return [trajectory([10, 11, 12], [0, 1, 1]), trajectory([20, 21], [0, 1]), trajectory([30, 31, 32], [0, 0, 1])]


def test_positions_restart_with_every_trajectory_and_are_zero_at_padding(rows):
    batch = build_micro_batch(((0, 1), (2,)), rows, seed=0)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 31, 32, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]]


def test_a_micro_batch_moves_with_every_tensor(rows):
    seen = []

    def note(tensor):
        seen.append(tensor)
        return tensor.clone()

    batch = build_micro_batch(((0, 1), (2,)), rows, seed=0)
    moved = batch.changed(note)
    everywhere = [moved.input_ids, moved.position_ids, moved.predicting, moved.places, moved.routes[0].places]
    assert len(seen) == len(everywhere) + 13 + 4  # columns of tokens, and two models' two signals
    assert not any(tensor is one for tensor in everywhere for one in seen)
    assert moved.lengths == batch.lengths
    assert torch.equal(moved.tokens.logprobs["base"], batch.tokens.logprobs["base"])
    assert moved.tokens.logprobs["base"] is not batch.tokens.logprobs["base"]


def test_every_completion_token_is_predicted_from_the_place_to_its_left(rows):
    batch = build_micro_batch(((0, 1), (2,)), rows, seed=0)
    assert batch.predicting.tolist() == [0, 1, 3, 6]
    assert batch.tokens.target_ids.tolist() == [11, 12, 21, 32]


def test_columns_of_every_model_come_in_grid_order(rows):
    tokens = build_micro_batch(((2, 1), (0,)), rows, seed=0).tokens
    assert tokens.rollout_logprobs.tolist() == [-32, -21, -11, -12]
    assert tokens.logprobs["base"].tolist() == [-8, -5.25, -2.75, -3]
    assert tokens.candidate_ids.tolist() == [[33], [22], [12], [13]]
    assert tokens.candidate_logprobs["teacher"].tolist() == [[-16], [-10.5], [-5.5], [-6]]
    assert tokens.candidate_rollout_logprobs.shape == (4, 0)
    assert tokens.teacher_entropy.tolist() == []


def test_every_token_knows_its_trajectory_and_its_place_in_it(rows):
    tokens = build_micro_batch(((2, 0), (1,)), rows, seed=0).tokens
    assert tokens.trajectory.tolist() == [0, 1, 1, 2]
    assert tokens.position.tolist() == [0, 0, 1, 0]
    assert tokens.length.tolist() == [1, 2, 2, 1]
    assert tokens.task_advantage.tolist() == [3, 1, 1, 2]


def test_every_token_knows_the_reward_of_its_trajectory_or_that_there_is_none(rows):
    tokens = build_micro_batch(((1, 0),), [replace(rows[0], reward=0.5), rows[1]], seed=0).tokens
    assert str(tokens.reward.tolist()) == "[nan, 0.5, 0.5]"
    scored = make_scored(OBJECTIVES["sampled"], [(3, 2), (3, 1)], "only")
    assert [row.reward for row in trajectories([scored])] == [1.0, 0.0]
    unknown = scored.set_column(scored.schema.get_field_index("reward"), "reward", pa.array([None, 0.0], pa.float32()))
    assert str([row.reward for row in trajectories([unknown])]) == "[nan, 0.0]"


def test_tokens_between_two_completions_are_not_targets():
    batch = build_micro_batch(((0,),), [trajectory([10, 11, 12, 13], [0, 1, 0, 1])], seed=0)
    assert batch.tokens.target_ids.tolist() == [11, 13]
    assert batch.predicting.tolist() == [0, 2]


def test_random_numbers_belong_to_the_trajectory_not_to_the_micro_batch(rows):
    together = build_micro_batch(((0, 1), (2,)), rows, seed=3).tokens
    alone = build_micro_batch(((2,),), rows, seed=3).tokens
    assert together.uniform[3:].tolist() == alone.uniform.tolist()
    assert together.uniform.min() >= 0
    assert together.uniform.max() < 1
    assert len(set(together.uniform.tolist())) == 4


def test_another_seed_or_trajectory_gives_other_random_numbers_and_more_of_them_begin_alike():
    numbers = uniform_numbers(seed=3, trajectory_id=7, count=4).tolist()
    assert uniform_numbers(3, 7, 6)[:4].tolist() == numbers
    assert uniform_numbers(4, 7, 4).tolist() != numbers
    assert uniform_numbers(3, 8, 4).tolist() != numbers


def test_hidden_states_of_each_route_stand_apart_with_the_places_of_their_tokens():
    states = {"teacher": {"hidden": np.array([[1, 2]], np.float32)}}
    wide = {"teacher": {"hidden": np.array([[3, 4, 5], [6, 7, 8]], np.float32)}}
    rows = [
        trajectory([20, 21], [0, 1], "narrow", wide_scores=states),
        trajectory([10, 11, 12], [0, 1, 1], "wide", wide_scores=wide),
        trajectory([30, 31], [0, 1], "narrow", wide_scores=states),
    ]
    narrow, wide = build_micro_batch(((0, 1), (2,)), rows, seed=0).routes
    assert (narrow.route, wide.route) == ("narrow", "wide")
    assert narrow.places.tolist() == [0, 3]
    assert wide.places.tolist() == [1, 2]
    assert narrow.hidden["teacher"].tolist() == [[1, 2], [1, 2]]
    assert [part.places.tolist() for part in wide.split(1)] == [[1], [2]]
    assert [part.hidden["teacher"].tolist() for part in wide.split(1)] == [[[3, 4, 5]], [[6, 7, 8]]]


def test_tokens_are_cut_into_parts_of_about_the_same_size():
    (route,) = build_micro_batch(((0,),), [trajectory([9] * 11, [0] + [1] * 10)], seed=0).routes
    assert [len(part.places) for part in route.split(4)] == [3, 3, 4]
    assert [len(part.places) for part in route.split(100)] == [10]


def test_hidden_states_that_come_as_bits_are_bfloat16():
    values = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    row = trajectory([20, 21], [0, 1], wide_scores={"teacher": {"hidden": values.view(torch.uint16).numpy()}})
    (route,) = build_micro_batch(((0,),), [row], seed=0).routes
    assert route.hidden["teacher"].dtype == torch.bfloat16
    assert route.hidden["teacher"].tolist() == [[1.5, -2.0]]


def test_an_empty_grid_is_one_pad_token_and_no_completion_tokens():
    batch = build_micro_batch((), [], seed=0)
    assert batch.input_ids.shape == (1, 1)
    assert len(batch.tokens) == 0
    assert batch.routes == ()


def test_rows_of_several_batches_come_in_order_with_their_advantages(scored):
    rows = trajectories([scored.slice(0, 2), scored.slice(2)], [0.5, -0.5, 0.0, 1.0, 2.0, 3.0, 4.0])
    assert [len(row.token_ids) for row in rows] == [12, 35, 3, 28, 48, 13, 13]
    assert [row.task_advantage for row in rows] == [0.5, -0.5, 0.0, 1.0, 2.0, 3.0, 4.0]
    np.testing.assert_array_equal(rows[3].candidate_ids, np.array(scored["candidate_ids"][3].as_py()))
    scores = np.array(scored["teacher_candidate_logprobs"][3].as_py(), np.float32)
    np.testing.assert_array_equal(rows[3].scores["teacher"]["candidate_logprobs"], scores)


def test_batches_of_different_teachers_may_have_hidden_states_of_different_width():
    heads = random_heads(OBJECTIVES["full"], {"narrow": 8, "wide": 12})
    batches = [make_scored(OBJECTIVES["full"], [(1, 2)], route, heads) for route in heads]
    assert [row.wide_scores["teacher"]["hidden"].shape for row in trajectories(batches)] == [(2, 8), (2, 12)]


def test_batches_with_different_numbers_of_candidates_are_refused(scored):
    with pytest.raises(TrajectoryError, match=r"differ in what they carry: 0 candidates, columns .*; 8 candidates"):
        trajectories([scored, make_scored(OBJECTIVES["sampled"])])


def test_moving_to_a_device_keeps_every_column(scored):
    batch = build_micro_batch(((0,), (1,)), trajectories([scored]), seed=0)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.tokens.target_ids, batch.tokens.target_ids)
    assert torch.equal(moved.routes[0].places, batch.routes[0].places)


def test_two_sampled_spans_of_a_row_are_predicted_from_the_places_before_their_tokens():
    first, second = trajectory([10, 11, 12, 13, 14, 15], [0, 1, 1, 0, 0, 1]), trajectory([20, 21], [0, 1])
    batch = build_micro_batch(((0, 1),), [first, second], seed=0)
    assert batch.predicting.tolist() == [0, 1, 4, 6]
    assert batch.tokens.target_ids.tolist() == [11, 12, 15, 21]
    assert batch.tokens.position.tolist() == [0, 1, 2, 0]
    assert batch.tokens.logprobs["teacher"].tolist() == [-5.5, -6, -7.5, -10.5]


def test_each_completion_token_knows_its_turn_of_the_episode(rows):
    first = trajectory([10, 11, 12, 13, 14, 15], [0, 1, 1, 0, 1, 0])
    further = trajectory([20, 21, 22, 23], [0, 1, 0, 1], turn=2)
    batch = build_micro_batch(((0, 1), (2,)), [first, further, trajectory([30, 31], [0, 0])], seed=0)
    assert batch.tokens.turn.tolist() == [0, 0, 1, 2, 3]
