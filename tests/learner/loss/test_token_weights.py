"""Sums and weights along trajectories, at numbers derived by hand."""

import math

import pytest
import torch

from cluster.config.fields import WeightSchedule
from cluster.config.objective import ObjectiveConfig, TokenWeightsConfig
from learner.loss.objective import Objective
from learner.loss.token_weights import (
    entropy_weights,
    is_early,
    is_trusted_trajectory,
    later_returns,
    position_importance,
    turn_weights,
)
from tests.learner.loss.builders import make_tokens, random_logprobs

TRAJECTORY = torch.tensor([0, 0, 0, 1, 2, 2])
POSITION = torch.tensor([0, 1, 2, 0, 0, 1])
LENGTH = torch.tensor([3, 3, 3, 1, 2, 2])


def test_later_advantages_are_discounted_and_end_with_the_trajectory() -> None:
    advantages = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert later_returns(advantages, TRAJECTORY, 0.5).tolist() == [2.0, 2.0, 0.0, 0.0, 16.0, 0.0]
    assert later_returns(advantages, TRAJECTORY, 1.0).tolist() == [6.0, 4.0, 0.0, 0.0, 32.0, 0.0]


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65])
def test_later_advantages_of_a_long_trajectory_are_those_of_the_recursion(length: int) -> None:
    advantages = torch.randn(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    expected, later = [0.0] * length, 0.0
    for place in reversed(range(length)):
        expected[place] = later
        later = 0.9 * (float(advantages[place]) + later)
    trajectory = torch.zeros(length, dtype=torch.long)
    assert later_returns(advantages, trajectory, 0.9).tolist() == pytest.approx(expected)


def test_a_trajectory_is_trusted_by_its_geometric_mean_ratio() -> None:
    ratios = torch.tensor([4.0, 1.0, 0.25, 3.0, 2.0, 2.0])  # means 1, 3, 2
    found = is_trusted_trajectory(ratios.log(), torch.zeros(6), TRAJECTORY, 0.5, 2.5)
    assert found.tolist() == [True, True, True, False, True, True]


@pytest.mark.parametrize(
    ("tokens", "fraction", "expected"),
    [
        (None, None, [1, 1, 1, 1, 1, 1]),
        (2, None, [1, 1, 0, 1, 1, 1]),
        (None, 0.5, [1, 1, 0, 1, 1, 0]),
        (None, 0.01, [1, 0, 0, 1, 1, 0]),
        (1, 0.5, [1, 0, 0, 1, 1, 0]),
    ],
)
def test_early_tokens_are_counted_per_completion(
    tokens: int | None, fraction: float | None, expected: list[int]
) -> None:
    assert is_early(POSITION, LENGTH, tokens, fraction).long().tolist() == expected
    skipped = [early * later for early, later in zip(expected, [0, 1, 1, 0, 0, 1], strict=True)]
    assert is_early(POSITION, LENGTH, tokens, fraction, skipped=1).long().tolist() == skipped


def test_early_tokens_weigh_more_by_the_share_of_log_ratio_still_to_come() -> None:
    log_ratio = torch.tensor([1.0, -2.0, 1.0, -3.0, 0.0, 0.0])
    # Shares before the token: 0, 1/4, 3/4; 0; a trajectory of zeros has seen nothing.
    expected = [1.5, 1 + 0.5 * 0.75, 1 + 0.5 * 0.25, 1.5, 1.5, 1.5]
    assert position_importance(log_ratio, TRAJECTORY, 0.5).tolist() == pytest.approx(expected)


def test_entropy_weights_favour_a_sure_teacher_and_an_unsure_student_and_average_to_one() -> None:
    teacher = torch.tensor([2.0, 1.0, 0.0, 5.0, 0.0, 0.0])
    student = torch.tensor([1.0, 2.0, 0.0, 5.0, 3.0, 1.0])
    # (2 - H_T / 2) (1 + H_S / 2): 1.5, 3, 2 with mean 6.5 / 3; one token has the mean; 2 * (2, 4/3) with mean 10/3.
    both = [1.5 / 6.5 * 3, 3 / 6.5 * 3, 2 / 6.5 * 3, 1.0, 1.2, 0.8]
    assert entropy_weights(teacher, student, TRAJECTORY).tolist() == pytest.approx(both)
    # Teacher alone: 1, 1.5, 2 with mean 1.5; 1; a teacher that is sure everywhere.
    assert entropy_weights(teacher, None, TRAJECTORY).tolist() == pytest.approx([2 / 3, 1, 4 / 3, 1, 1, 1])


def test_other_trajectories_of_the_batch_change_nothing() -> None:
    values = torch.rand(6, generator=torch.Generator().manual_seed(0)) * math.pi
    rows = slice(4, 6)
    alone, values_alone = TRAJECTORY[rows] - 2, values[rows]
    assert torch.equal(later_returns(values, TRAJECTORY, 0.7)[rows], later_returns(values_alone, alone, 0.7))
    assert torch.equal(
        position_importance(values, TRAJECTORY, 0.5)[rows], position_importance(values_alone, alone, 0.5)
    )
    assert torch.equal(
        entropy_weights(values, values, TRAJECTORY)[rows], entropy_weights(values_alone, values_alone, alone)
    )


def test_no_tokens_give_nothing() -> None:
    empty, nowhere = torch.empty(0), torch.empty(0, dtype=torch.long)
    assert len(later_returns(empty, nowhere, 0.5)) == 0
    assert len(position_importance(empty, nowhere, 0.5)) == 0
    assert len(entropy_weights(empty, empty, nowhere)) == 0
    assert len(is_trusted_trajectory(empty, empty, nowhere, 0.5, 2.0)) == 0


def test_every_turn_of_a_row_counts_alike_and_the_row_as_many_as_its_tokens():
    turn = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    trajectory = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])  # the second row is of one turn, its episode's third
    weights = turn_weights(turn, trajectory)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 4 / 6, 4 / 6, 2.0, 1, 1, 1, 1]))
    assert turn_weights(turn[:0], trajectory[:0]).shape == (0,)


def test_turns_after_the_first_few_have_no_weight_and_their_number_follows_a_schedule():
    turn = torch.tensor([0, 0, 1, 2])
    config = ObjectiveConfig(
        token_weights=TokenWeightsConfig(first_turns=WeightSchedule(start=1.0, to=3.0, over_steps=4), turns="equal")
    )
    tokens = make_tokens(torch.arange(4), {"teacher": random_logprobs(4, 8, seed=0)}, turn=turn)
    two, one = 2 / 3, 4 / 3  # 4 tokens over 3 turns of 2 tokens and of 1
    expected = {0: [two, two, 0, 0], 1: [two, two, 0, 0], 2: [two, two, one, 0], 4: [two, two, one, one]}
    for step, weights in expected.items():
        plan = Objective(config.at(step)).plan(tokens, None)
        torch.testing.assert_close(plan.weights.float(), torch.tensor(weights, dtype=torch.float32))
    with pytest.raises(ValueError, match="first_turns goes from 0 to 3; expected 1 or more turns"):
        TokenWeightsConfig(first_turns=WeightSchedule(start=0.0, to=3.0, over_steps=4))
