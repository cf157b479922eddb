"""The balancer on traces: where it arrives, how often it moves, and that it never goes to and fro."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config.stages import BalanceConfig
from cluster.elastic.balance_policy import Balance, BalanceSample, Decision, Horizon, describe_move
from cluster.elastic.splits import PoolRule, Space, step_seconds
from cluster.elastic.step_cost import Generation, StepWork, TeacherWork, WorkMeter
from tests.cluster.run.simulated_run import Load, Simulation, best_split, seconds_at

AUTO = BalanceConfig(mode="auto")
Sizes = dict[str, int]

# Six workers; the best split of each is another one.
LOADS = {
    "rollout-bound": Load(rows=128, slots=4, score_tokens_per_second=6000),
    "teacher-bound": Load(rows=96, slots=16, score_tokens_per_second=900),
    "learner-bound": Load(rows=96, slots=16, learn_tokens_per_second=1500, score_tokens_per_second=4000),
    "long tail": Load(rows=64, sigma=1.2, score_tokens_per_second=1500),
    "slow when full": Load(rows=64, slots=32, sigma=0.3, seconds_per_running=0.002, score_tokens_per_second=6000),
}
TWO_TEACHERS = Load(rows=96, slots=16, shares=(3.0, 1.0), score_tokens_per_second=900)


@dataclass
class Driver:
    """A run that shows its steps to a balancer and does what it says."""

    balance: Balance
    sizes: Sizes
    unsettled_steps: int = 1  # after a move
    moves: list[Sizes] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    _unsettled: int = 0

    def see(self, work: StepWork | None, steps_left: int = 1000) -> Decision | None:
        seconds = work.seconds if work else 1.0
        decision = self.balance.decide(BalanceSample(self.sizes, not self._unsettled, seconds, steps_left, work))
        self._unsettled = max(0, self._unsettled - 1)
        if decision is not None:
            self.sentences.append(decision.sentence)
            if decision.sizes is not None:
                self.sizes = dict(decision.sizes)
                self.moves.append(self.sizes)
                self._unsettled = self.unsettled_steps
        return decision

    def run(self, simulation: Simulation, steps: range, slots: int = 64) -> list[float]:
        """Do simulated steps, and return the seconds of each."""
        meter = WorkMeter(slots, steps_ahead=0)
        seconds = []
        for step in steps:
            record, batches = simulation.step(step, self.sizes)
            self.see(meter.measure(record, batches, self.sizes["rollout"]), steps.stop - step)
            seconds.append(record["step/seconds"])
        return seconds


def make_driver(
    sizes: Mapping[str, int], config: BalanceConfig = AUTO, start_seconds: float = 1.0, **rules: PoolRule
) -> Driver:
    space = Space({name: rules.get(name.replace(".", "_"), PoolRule(1)) for name in sizes}, units=0)
    return Driver(Balance(space, config, Horizon(0, start_seconds, patience_seconds=30.0)), dict(sizes))


def splits(workers: int, teachers: int) -> list[Sizes]:
    """Return every split of so many workers."""
    return [
        {"rollout": workers - sum(of_teachers), **{f"teachers.{index}": size for index, size in enumerate(of_teachers)}}
        for of_teachers in product(range(1, workers), repeat=teachers)
        if sum(of_teachers) < workers
    ]


@pytest.mark.parametrize("start", [0, -1])
@pytest.mark.parametrize("name", LOADS)
def test_from_either_end_it_comes_within_a_tenth_of_the_best_split_and_stays(name: str, start: int) -> None:
    load, candidates = LOADS[name], splits(6, 1)
    driver = make_driver(candidates[start])
    driver.run(Simulation(lambda _: load, noise=0.05), range(60))
    _, best = best_split(load, candidates)
    assert seconds_at(load, driver.sizes) <= 1.1 * best
    settled = len(driver.moves)
    driver.run(Simulation(lambda _: load, noise=0.05), range(60, 110))
    assert settled <= 5
    assert len(driver.moves) <= settled + 1


def test_two_teachers_that_hold_the_steps_up_are_both_helped() -> None:
    driver = make_driver({"rollout": 6, "teachers.0": 1, "teachers.1": 1})
    driver.run(Simulation(lambda _: TWO_TEACHERS), range(60))
    assert seconds_at(TWO_TEACHERS, driver.sizes) <= 1.1 * best_split(TWO_TEACHERS, splits(8, 2))[1]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", LOADS)
def test_at_the_best_split_noise_moves_nobody_to_a_worse_one(name: str, seed: int) -> None:
    load = LOADS[name]
    best, seconds = best_split(load, splits(6, 1))
    driver = make_driver(best)
    driver.run(Simulation(lambda _: load, seed=seed, noise=0.1), range(50))
    assert seconds_at(load, driver.sizes) <= 1.1 * seconds
    assert len(driver.moves) <= 2  # one trial, taken back


def test_when_the_load_shifts_the_split_follows() -> None:
    first, then = LOADS["rollout-bound"], LOADS["teacher-bound"]
    driver = make_driver({"rollout": 3, "teachers.0": 3})
    simulation = Simulation(lambda step: first if step < 60 else then)
    driver.run(simulation, range(60))
    assert seconds_at(first, driver.sizes) <= 1.1 * best_split(first, splits(6, 1))[1]
    driver.run(simulation, range(60, 140))
    assert seconds_at(then, driver.sizes) <= 1.1 * best_split(then, splits(6, 1))[1]


def test_steps_of_two_kinds_get_the_split_that_is_best_for_both() -> None:
    kinds = LOADS["rollout-bound"], LOADS["teacher-bound"]

    def both(sizes: Sizes) -> float:
        return sum(seconds_at(load, sizes) for load in kinds)

    driver = make_driver({"rollout": 1, "teachers.0": 5})
    driver.run(Simulation(lambda step: kinds[step % 2]), range(120))
    assert both(driver.sizes) <= 1.1 * min(both(sizes) for sizes in splits(6, 1))
    assert len(driver.moves) <= 4


@pytest.mark.parametrize("period", [3, 9, 25])
def test_loads_that_change_sides_again_and_again_are_followed_less_and_less(period: int) -> None:
    kinds = LOADS["rollout-bound"], LOADS["teacher-bound"]
    driver = make_driver({"rollout": 3, "teachers.0": 3})
    driver.run(Simulation(lambda step: kinds[step // period % 2]), range(300))
    assert num_returns(driver.moves, {"rollout": 3, "teachers.0": 3}) <= most_returns(300)


def num_returns(moves: Sequence[Sizes], start: Sizes) -> int:
    """Count the moves to a split that had been left."""
    been = [start, *moves]
    return sum(sizes in been[: index + 1] for index, sizes in enumerate(moves))


def most_returns(steps: int) -> int:
    # A wait brings two returns at most: to a split that was left, and back. So before the last of r, which may be the
    # second, the balancer waited for cooldown x 2^(r - 2) steps.
    return 2 + math.floor(math.log2(max(1.0, steps / AUTO.cooldown_steps)))


def make_work(seconds: float, generation: float, *teachers: float) -> StepWork:
    return StepWork(
        seconds=seconds,
        tokens=1000.0,
        generation=Generation(0.0, generation, 0.0),
        first_share=0.1,
        teachers={f"teachers.{index}": TeacherWork(busy, 0.1) for index, busy in enumerate(teachers)},
        learn_seconds=0.5,
        last_learn_seconds=0.1,
        sync_seconds=0.1,
    )


WORK = st.floats(0.1, 100.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), WORK, WORK, WORK, st.floats(0.1, 50.0)), min_size=2, max_size=20))
def test_no_load_whatever_makes_it_go_to_and_fro(phases: list[tuple[int, float, float, float, float]]) -> None:
    start = {"rollout": 3, "teachers.0": 2, "teachers.1": 1}
    driver = make_driver(start)
    steps = 0
    for length, generation, one, other, seconds in phases:
        for _ in range(length):
            driver.see(make_work(seconds, generation, one, other))
            steps += 1
    assert num_returns(driver.moves, start) <= most_returns(steps)
    assert len(driver.moves) <= len(splits(6, 2)) + most_returns(steps)
    assert all(sum(sizes.values()) == 6 and min(sizes.values()) >= 1 for sizes in driver.moves)


def follow(driver: Driver, steps: int, predict: Callable[[Sizes], float], work: StepWork) -> None:
    """Show steps whose seconds are those of `predict`, whatever the work says."""
    for _ in range(steps):
        driver.see(replace(work, seconds=predict(driver.sizes)))


def test_a_move_that_makes_steps_longer_is_taken_back_and_not_tried_again() -> None:
    start = {"rollout": 3, "teachers.0": 1}
    driver = make_driver(start)
    follow(driver, 200, lambda sizes: 4.0 if sizes == start else 5.0, make_work(4.0, 3.0, 4.0))
    assert driver.moves == [{"rollout": 2, "teachers.0": 2}, start]
    assert driver.sentences[1].startswith("rollout 2 -> 3, teachers.0 2 -> 1, taken back: steps became 25% longer")


def test_a_move_is_explained_by_what_the_pools_had_to_do_and_judged_by_what_steps_take() -> None:
    work = make_work(4.0, 3.0, 4.0)
    driver = make_driver({"rollout": 3, "teachers.0": 1})
    follow(driver, 12, lambda sizes: step_seconds(work, sizes, 0), work)
    # The teacher begins at 0.1 s and works for 4 s; a batch for the learner and the weight sync take 0.1 s each: 4.3 s.
    # With two: it begins at 0.15 s and works for 2 s.
    assert driver.sentences == [
        "rollout 3 -> 2, teachers.0 1 -> 2: of a step's 4.30 s rollout works 23%, "
        "teachers.0 works 93% with 0.0 batches at hand; 2.35 s are expected (-45%)",
        "kept rollout=2 teachers.0=2: steps became 45% shorter",
    ]


def test_a_straggler_that_keeps_its_worker_busy_causes_trials_that_make_no_step_longer() -> None:
    load = Load(rows=32, sigma=1.5, longest=2000, slots=32, score_tokens_per_second=9000)
    driver = make_driver({"rollout": 2, "teachers.0": 4})
    before = seconds_at(load, driver.sizes)
    driver.run(Simulation(lambda _: load), range(60))
    assert seconds_at(load, driver.sizes) <= 1.01 * before
    assert len(driver.moves) <= 3


def test_a_straggler_that_others_may_slow_down_causes_one_trial_which_must_shorten_steps() -> None:
    start = {"rollout": 2, "teachers.0": 4}
    work = make_work(6.0, 0.1, 0.5)
    bound = replace(work, generation=Generation(6.0, 2.0, 5.0))
    driver = make_driver(start)
    follow(driver, 100, lambda sizes: 6.0, bound)
    assert driver.moves == [{"rollout": 3, "teachers.0": 3}, start]
    helped = make_driver(start)
    follow(helped, 100, lambda sizes: 12.0 / sizes["rollout"], bound)
    assert helped.sizes == {"rollout": 5, "teachers.0": 1}


def test_nobody_moves_before_enough_steps_were_seen_with_all_workers_serving() -> None:
    driver = make_driver({"rollout": 3, "teachers.0": 1}, BalanceConfig("auto", observe_steps=6, cooldown_steps=1))
    driver._unsettled = 3
    follow(driver, 8, lambda sizes: 4.0, make_work(4.0, 3.0, 4.0))
    assert driver.moves == []
    follow(driver, 1, lambda sizes: 4.0, make_work(4.0, 3.0, 4.0))
    assert driver.moves == [{"rollout": 2, "teachers.0": 2}]


def test_a_gain_below_the_least_is_none() -> None:
    work = make_work(4.0, 3.0, 4.0)
    driver = make_driver({"rollout": 3, "teachers.0": 1}, BalanceConfig("auto", min_gain=0.6))
    follow(driver, 50, lambda sizes: 4.0, work)
    assert driver.moves == []


@pytest.mark.parametrize(("steps_left", "moves"), [(1, 0), (100, 1)])
def test_a_start_that_the_steps_to_come_do_not_pay_for_is_not_made(steps_left: int, moves: int) -> None:
    # 5.0 s a step now, 4.3 s with 3 and 2. With 3 and 1, while the other starts, 5.1 s: of 60 s, 1.2 s are lost.
    work = make_work(4.5, 12.0, 4.5)
    driver = make_driver({"rollout": 4, "teachers.0": 1}, start_seconds=60.0)
    for _ in range(6):
        driver.see(work, steps_left)
    assert len(driver.moves) == moves


def test_limits_are_kept() -> None:
    driver = make_driver({"rollout": 3, "teachers.0": 3}, rollout=PoolRule(1, least=3))
    follow(driver, 100, lambda sizes: 4.0, make_work(4.0, 0.1, 9.0))
    assert driver.moves == []


def test_workers_that_do_not_start_in_time_are_given_back() -> None:
    driver = make_driver({"rollout": 3, "teachers.0": 1})
    driver.unsettled_steps = 100
    follow(driver, 20, lambda sizes: 4.0, make_work(4.0, 3.0, 4.0))
    assert driver.moves == [{"rollout": 2, "teachers.0": 2}, {"rollout": 3, "teachers.0": 1}]
    assert driver.sentences[-1].endswith("taken back: its workers did not start within 30 s")


def test_somebody_elses_sizes_are_taken_as_they_are_and_observed_anew() -> None:
    driver = make_driver({"rollout": 3, "teachers.0": 1})
    follow(driver, 6, lambda sizes: 4.0, make_work(4.0, 3.0, 4.0))
    assert driver.sizes == {"rollout": 2, "teachers.0": 2}
    driver.sizes = {"rollout": 4, "teachers.0": 2}
    follow(driver, 4, lambda sizes: 9.0, make_work(9.0, 3.0, 4.0))
    assert driver.sentences[-1] == "observing anew, with rollout=4 teachers.0=2"
    assert len(driver.moves) == 1
    follow(driver, 10, lambda sizes: 9.0, make_work(9.0, 3.0, 9.0))
    assert driver.moves[-1] == {"rollout": 2, "teachers.0": 4}


def test_only_pools_that_change_are_named() -> None:
    before = {"rollout": 4, "teachers.a": 2, "teachers.b": 1}
    assert describe_move(before, {**before, "rollout": 3, "teachers.b": 2}) == "rollout 4 -> 3, teachers.b 1 -> 2"
