"""Which trajectories of a step may be learned from as they arrive, and what a rank is told of them."""

from dataclasses import replace

import pytest

from cluster.config.objective import ObjectiveConfig, TokenWeightsConfig
from cluster.config.terms import TaskRewardTerm
from cluster.contracts.batches import BatchHandle
from learner.batching.arrivals import BatchBuffer

REWARDED = ObjectiveConfig(support="sampled", terms={"reward": TaskRewardTerm(divide_by_deviation=False)})


def handle(name, trajectory_ids, rewards=None):
    """Describe rows of a prompt of ten tokens and a completion of as many as the trajectory's id."""
    lengths = tuple(10 + trajectory_id for trajectory_id in trajectory_ids)
    given = tuple(rewards or [None] * len(trajectory_ids))
    return BatchHandle(name, "only", tuple(trajectory_ids), lengths, tuple(trajectory_ids), rewards=given)


def test_without_a_task_reward_every_trajectory_is_released_as_it_comes():
    arrivals = BatchBuffer(ObjectiveConfig(), samples_per_prompt=2)
    assert arrivals.add(handle("a", [4, 1])) == [0, 1]
    assert arrivals.add(handle("b", [9])) == [2]
    assert arrivals.num_tokens(range(3)) == {0: 14, 1: 11, 2: 19}
    assert arrivals.num_loss_tokens == 4 + 1 + 9


def test_a_task_reward_holds_trajectories_back_until_all_samples_of_their_prompt_are_there():
    arrivals = BatchBuffer(REWARDED, samples_per_prompt=2)
    assert arrivals.add(handle("a", [0, 2], [1.0, 5.0])) == []  # samples 0 of the first two prompts
    assert arrivals.add(handle("b", [3], [7.0])) == [1, 2]
    assert arrivals.add(handle("c", [1], [0.0])) == [0, 3]
    share = arrivals.share((((0, 1),), ((2,), (3,))))
    assert share.references == ("a", "b", "c")
    assert share.task_advantages == (0.5, -1.0, 1.0, -0.5)


def test_a_rank_is_told_of_the_batches_that_its_micro_batches_touch_and_of_no_others():
    arrivals = BatchBuffer(ObjectiveConfig(), samples_per_prompt=1)
    for name, ids in (("a", [0, 1]), ("b", [2]), ("c", [3, 4])):
        arrivals.add(handle(name, ids))
    share = arrivals.share((((4, 0),), ((1,),)))
    assert share.references == ("a", "c")
    assert share.grids == (((3, 0),), ((1,),))


def test_a_prompt_without_all_its_samples_is_released_at_the_end():
    arrivals = BatchBuffer(REWARDED, samples_per_prompt=3)
    assert arrivals.add(handle("a", [0, 1], [1.0, 0.0])) == []
    assert arrivals.rest() == [0, 1]
    assert arrivals.share((((0, 1),),)).task_advantages == (0.5, -0.5)
    assert arrivals.rest() == []


def test_all_rows_of_an_episode_have_its_advantage_and_count_as_one_sample():
    arrivals = BatchBuffer(REWARDED, samples_per_prompt=2)
    two_rows = replace(handle("a", [0, 5, 2], [1.0, 1.0, 4.0]), episode_ids=(0, 0, 2))
    assert arrivals.add(two_rows) == []
    assert arrivals.add(handle("b", [1], [0.0])) == [0, 1, 3]
    assert arrivals.add(handle("c", [3], [8.0])) == [2, 4]
    assert arrivals.share((((0, 1, 2, 3, 4),),)).task_advantages == (0.5, 0.5, -2.0, -0.5, 2.0)


def of_teachers(shares, *rows):
    """Return what a rank is told of rows that came as batches of one: (teacher, completion tokens)."""
    objective = ObjectiveConfig(token_weights=TokenWeightsConfig(teacher_shares=shares))
    arrivals = BatchBuffer(objective, samples_per_prompt=1)
    for teacher, tokens in rows:
        assert arrivals.add(BatchHandle(teacher, teacher, (0,), (9,), (tokens,))) == []  # held back
    assert arrivals.rest() == list(range(len(rows)))
    assert arrivals.rest() == []
    return arrivals.share((((tuple(range(len(rows)))),),)).weights


def test_the_tokens_of_each_teacher_count_its_share_together_however_many_they_are():
    rows = [("math", 30), ("code", 10), ("math", 60)]
    assert of_teachers("equal", *rows) == pytest.approx((100 / 180, 5.0, 100 / 180))
    assert of_teachers({"math": 3.0, "code": 1.0}, *rows) == pytest.approx((75 / 90, 2.5, 75 / 90))
    # A teacher without tokens in the step leaves its share to the others.
    assert of_teachers({"math": 3.0, "code": 1.0}, ("math", 30), ("code", 0)) == pytest.approx((1.0, 0.0))
    assert of_teachers("equal", ("math", 0)) == (0.0,)


def test_without_shares_a_rank_is_told_of_no_weights():
    arrivals = BatchBuffer(ObjectiveConfig(), samples_per_prompt=1)
    arrivals.add(handle("a", [4]))
    assert arrivals.share((((0,),),)).weights == ()
