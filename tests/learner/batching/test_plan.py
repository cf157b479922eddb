"""Which rank computes which trajectory, and where in its grid."""

import numpy as np
import pytest

from learner.batching.plan import balance, plan_step


def used(plan):
    return sorted(index for rank in plan for grid in rank for row in grid for index in row)


def test_the_longest_trajectory_goes_to_the_emptiest_rank():
    # 9 -> rank 0, 7 -> rank 1, 5 -> rank 1 (12), 4 -> rank 0 (13)
    assert balance([4, 9, 5, 7], 2) == [[1, 0], [3, 2]]


def test_short_trajectories_share_a_row_of_the_grid():
    # Rows of 8 tokens, two fit 16: [8] and [5, 3]; 2 needs another grid.
    assert plan_step([3, 8, 5, 2], num_ranks=1, micro_batch_tokens=16) == ((((1,), (2, 0)), ((3,),)),)


def test_every_rank_runs_as_many_micro_batches():
    plan = plan_step([10, 10, 10], num_ranks=2, micro_batch_tokens=10)
    assert plan == ((((0,),), ((2,),)), (((1,),), ()))


def test_a_trajectory_longer_than_the_budget_travels_alone():
    assert plan_step([50, 3, 3], num_ranks=1, micro_batch_tokens=8) == ((((0,),), ((1,), (2,))),)


def test_no_trajectories_still_give_every_rank_one_micro_batch():
    assert plan_step([], num_ranks=2, micro_batch_tokens=8) == (((),), ((),))


def test_every_trajectory_is_placed_once_and_no_grid_exceeds_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 300).tolist()
    plan = plan_step(lengths, num_ranks=3, micro_batch_tokens=128)
    assert used(plan) == list(range(300))
    for rank in plan:
        for grid in rank:
            longest = max((sum(lengths[index] for index in row) for row in grid), default=0)
            assert longest * len(grid) <= 128


def test_little_of_the_grids_is_padding():
    lengths = np.random.default_rng(1).integers(1, 512, 400).tolist()
    (grids,) = plan_step(lengths, num_ranks=1, micro_batch_tokens=4096)
    area = sum(len(grid) * max(sum(lengths[index] for index in row) for row in grid) for grid in grids)
    assert sum(lengths) / area > 0.9


def first_fit(lengths, budget):
    """Place the longest first, each in the first row that has room, looking at every row for every trajectory."""
    waiting, grids = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)), []
    while waiting:
        width, rows, left_over = max(1, lengths[waiting[0]]), [], []
        for index in waiting:
            fitting = [row for row in rows if sum(lengths[other] for other in row) + lengths[index] <= width]
            if fitting:
                fitting[0].append(index)
            elif (len(rows) + 1) * width <= max(budget, width):
                rows.append([index])
            else:
                left_over.append(index)
        grids.append(tuple(map(tuple, rows)))
        waiting = left_over
    return tuple(grids)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("longest", "budget"), [(4, 6), (20, 60), (60, 100), (60, 10)])
def test_every_trajectory_stands_in_the_first_row_that_has_room(seed, longest, budget):
    random = np.random.default_rng([seed, longest])
    lengths = random.integers(seed % 2, longest, random.integers(1, 80)).tolist()
    (grids,) = plan_step(lengths, num_ranks=1, micro_batch_tokens=budget)
    assert grids == first_fit(lengths, budget)
