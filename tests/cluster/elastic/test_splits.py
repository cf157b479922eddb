"""Other splits: which can be reached, and how long a step would take there."""

from dataclasses import replace

import pytest

from cluster.elastic.splits import PoolRule, Sizes, Space, path_to_better, step_seconds
from cluster.elastic.step_cost import Generation, StepWork, TeacherWork

SPACE = Space({"rollout": PoolRule(1), "teachers.a": PoolRule(1), "teachers.b": PoolRule(1)}, units=6)


def make_work(generation: float = 4.0, learn: float = 0.0, **teachers: float) -> StepWork:
    """Return a step whose generation, in seconds of all workers, is shared to the last token."""
    return StepWork(
        seconds=10.0,
        tokens=1000.0,
        generation=Generation(0.0, generation, 0.0),
        first_share=0.0,
        teachers={f"teachers.{name}": TeacherWork(busy, 0.0) for name, busy in teachers.items()},
        learn_seconds=learn,
        last_learn_seconds=0.0,
        sync_seconds=0.5,
    )


def sizes(rollout: int, a: int, b: int) -> Sizes:
    return {"rollout": rollout, "teachers.a": a, "teachers.b": b}


def test_the_slowest_stage_makes_a_steps_length() -> None:
    work = make_work(generation=4.0, a=9.0, b=1.0)
    assert step_seconds(work, sizes(2, 3, 1), steps_ahead=0) == pytest.approx(3.0 + 0.5)
    assert step_seconds(work, sizes(1, 3, 2), steps_ahead=0) == pytest.approx(4.0 + 0.5)


def test_a_batch_is_scored_after_it_is_written_unless_generation_runs_ahead() -> None:
    work = replace(make_work(generation=4.0, a=4.0), first_share=0.5)
    # Strictly: half of the generation's 4 s pass, then the teacher works for 4 s. One step ahead, 4 s each at a time.
    assert step_seconds(work, {"rollout": 1, "teachers.a": 1}, steps_ahead=0) == pytest.approx(6.5)
    assert step_seconds(work, {"rollout": 1, "teachers.a": 1}, steps_ahead=1) == pytest.approx(4.0)


def test_two_pools_that_hold_a_step_up_together_are_both_helped() -> None:
    *_, best = path_to_better(SPACE, [make_work(generation=4.0, a=4.0, b=4.0)], sizes(4, 1, 1), 0)
    assert best == sizes(2, 2, 2)


def test_nothing_is_better_where_the_learner_is_the_slowest_but_an_even_load() -> None:
    path = path_to_better(SPACE, [make_work(generation=4.0, learn=20.0, a=4.0, b=4.0)], sizes(4, 1, 1), 0)
    assert {step_seconds(make_work(learn=20.0, a=4.0, b=4.0), found, 0) for found in path} == {20.5}


def test_the_best_split_of_steps_that_differ_is_not_that_of_their_mean() -> None:
    space = Space({"rollout": PoolRule(1), "teachers.a": PoolRule(1)}, units=4)
    works = [make_work(generation=9.0, a=1.0), make_work(generation=1.0, a=5.0)]
    # 3 and 1: 3 + 5 s; 2 and 2: 4.5 + 2.5 s; 1 and 3: 9 + 1.7 s.
    *_, best = path_to_better(space, works, {"rollout": 3, "teachers.a": 1}, 0)
    assert best == {"rollout": 2, "teachers.a": 2}


def test_limits_hold_and_a_pool_beyond_them_may_stay() -> None:
    rules = {"rollout": PoolRule(1, least=3), "teachers.a": PoolRule(1, most=2), "teachers.b": PoolRule(1)}
    assert list(Space(rules, units=6).exchanges(sizes(3, 2, 1))) == [sizes(4, 1, 1), sizes(3, 1, 2)]
    reach = Space(rules, units=6).within_reach(sizes(2, 3, 1))
    assert list(reach.exchanges(sizes(2, 3, 1))) == [sizes(3, 2, 1), sizes(2, 2, 2)]  # rollout gives nobody


def test_one_move_doubles_or_halves_a_pool_at_most() -> None:
    rules = {"rollout": PoolRule(1), "teachers.a": PoolRule(1)}
    reach = Space(rules, units=12).within_reach({"rollout": 11, "teachers.a": 1})
    assert (reach.rules["rollout"].least, reach.rules["teachers.a"].most) == (6, 2)


def test_workers_of_several_gpus_take_the_place_of_several() -> None:
    rules = {"rollout": PoolRule(1), "teachers.a": PoolRule(4)}
    space = Space(rules, units=12)
    assert list(space.exchanges({"rollout": 8, "teachers.a": 1})) == [
        {"rollout": 4, "teachers.a": 2},
    ]
    assert list(space.exchanges({"rollout": 4, "teachers.a": 2})) == [{"rollout": 8, "teachers.a": 1}]


def test_a_split_that_no_node_has_room_for_is_none() -> None:
    space = replace(SPACE, fits=lambda found: found["teachers.a"] < 2)
    assert all(found["teachers.a"] < 2 for found in space.exchanges(sizes(4, 1, 1)))
