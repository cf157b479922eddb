"""Rewards relative to the other samples of the same prompt."""

import pytest

from cluster.config.objective import ObjectiveConfig
from cluster.config.terms import TaskRewardTerm
from learner.batching.arrivals import group_advantages


def objective(**divides):
    terms = {name: TaskRewardTerm(divide_by_deviation=value) for name, value in divides.items()}
    return ObjectiveConfig(support="sampled", terms=terms)


def test_the_mean_of_the_samples_is_subtracted():
    assert group_advantages([5.0, 7.0], divide_by_deviation=False) == [-1.0, 1.0]


def test_advantages_are_in_units_of_the_sample_deviation():
    # Of 1, 2, 3 the mean is 2 and the sample deviation 1.
    assert group_advantages([1.0, 2.0, 3.0], divide_by_deviation=True) == pytest.approx([-1.0, 0.0, 1.0], abs=2e-4)


def test_equal_rewards_give_no_advantage():
    assert group_advantages([1.0, 1.0], divide_by_deviation=True) == [0.0, 0.0]


def test_samples_without_a_reward_are_no_part_of_the_group():
    assert group_advantages([1.0, None, 0.0], divide_by_deviation=False) == [0.5, 0.0, -0.5]


def test_a_reward_without_another_to_compare_with_gives_no_advantage():
    assert group_advantages([1.0, None], divide_by_deviation=True) == [0.0, 0.0]


def test_an_objective_without_a_task_reward_compares_nothing():
    assert ObjectiveConfig().needs.divides_by_deviation is None
    assert objective(reward=False).needs.divides_by_deviation is False
