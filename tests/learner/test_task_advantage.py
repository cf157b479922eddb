"""Rewards relative to the other samples of the same prompt."""

import pytest

from cluster.contracts.errors import ConfigError
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.objective import ObjectiveConfig, TaskRewardTerm
from learner.task_advantage import group_advantages, step_advantages


def handle(prompt_ids, rewards):
    counts = (1,) * len(prompt_ids)
    return BatchHandle(None, "only", counts, counts, counts, prompt_ids, rewards)


def objective(**divides):
    terms = {name: TaskRewardTerm(divide_by_deviation=value) for name, value in divides.items()}
    return ObjectiveConfig(support="sampled", terms=terms)


def test_the_mean_of_the_prompts_own_samples_is_subtracted():
    assert group_advantages([1, 2, 1, 2], [1.0, 5.0, 0.0, 7.0], divide_by_deviation=False) == [0.5, -1.0, -0.5, 1.0]


def test_advantages_are_in_units_of_the_prompts_sample_deviation():
    # Of 1, 2, 3 the mean is 2 and the sample deviation 1.
    found = group_advantages([4, 4, 4], [1.0, 2.0, 3.0], divide_by_deviation=True)
    assert found == pytest.approx([-1.0, 0.0, 1.0], abs=2e-4)


def test_equal_rewards_give_no_advantage():
    assert group_advantages([4, 4], [1.0, 1.0], divide_by_deviation=True) == [0.0, 0.0]


def test_samples_without_a_reward_are_no_part_of_the_group():
    assert group_advantages([4, 4, 4], [1.0, None, 0.0], divide_by_deviation=False) == [0.5, 0.0, -0.5]


def test_a_reward_without_another_to_compare_with_gives_no_advantage():
    assert group_advantages([4, 5, 4], [1.0, 1.0, None], divide_by_deviation=True) == [0.0, 0.0, 0.0]


def test_samples_of_one_prompt_meet_across_the_batches_of_a_step():
    handles = [handle((7, 8), (1.0, 0.0)), handle((8, 7), (1.0, 0.0))]
    assert step_advantages(handles, objective(reward=False)) == [0.5, -0.5, 0.5, -0.5]


def test_without_a_task_reward_nobody_asks_for_prompts_and_rewards():
    handles = [BatchHandle(None, "only", (1, 2), (3, 4), (1, 1))]
    assert step_advantages(handles, ObjectiveConfig()) == [0.0, 0.0]


def test_task_rewards_that_want_different_advantages_are_refused():
    with pytest.raises(ConfigError, match="the same divide_by_deviation"):
        step_advantages([], objective(one=True, other=False))
