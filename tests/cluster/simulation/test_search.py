import pytest

from cluster.contracts.errors import ConfigError
from cluster.simulation.rates import LearnerRates, LogNormal, RolloutRates, TeacherRates
from cluster.simulation.search import Widths, find_split, work_seconds
from cluster.simulation.simulated_run import Demand, Split, simulate
from tests.builders import make_config
from tests.cluster.simulation.rates_builder import make_rates

ALIKE = ("prompts.prompts_per_step=16", "rollout.rows_per_batch=1", "rollout.engine.max_concurrent_sequences=1")


def test_the_work_of_a_step_is_told_in_gpu_seconds() -> None:
    config = make_config(*ALIKE, "teachers.main.engine.tensor_parallel=2")
    # 16 completions of 100 tokens at 10 ms, one at a time; 16 x 110 tokens at 1000/s on two GPUs, and at 10000/s.
    work = work_seconds(config, make_rates(), Widths.of(config))
    assert work == pytest.approx({"rollout": 16.0, "teachers.main": 3.52, "learner": 0.176})


def test_the_search_finds_the_split_that_trying_all_finds() -> None:
    config = make_config("prompts.prompts_per_step=24", "rollout.engine.max_concurrent_sequences=2")
    rates = make_rates(
        rollout=RolloutRates(((1, 0.01),), (10.0,), LogNormal(80.0, 0.6, 300)), learner=LearnerRates(1500.0)
    )
    demand = Demand(config, rates)
    splits = [
        Split(8 - teachers - ranks, {"main": teachers}, ranks)
        for teachers in range(1, 7)
        for ranks in range(1, 8 - teachers)
    ]
    exhaustive = min(simulate(config, rates, split, demand, 6).mean_step_seconds for split in splits)
    assert find_split(config, rates, 8).best.mean_step_seconds <= 1.03 * exhaustive


def test_no_gpu_is_left_out_and_engines_stay_whole() -> None:
    config = make_config(*ALIKE, "teachers.main.engine.tensor_parallel=2", "rollout.engine.tensor_parallel=2")
    split = find_split(config, make_rates(), 12).best.split
    assert 2 * split.rollout + 2 * split.teachers["main"] + split.learner == 12


def test_the_learner_keeps_the_ranks_that_hold_the_student() -> None:
    config = make_config(*ALIKE, "learner.num_workers=4")
    assert find_split(config, make_rates(), 8).best.split.learner == 4


def test_a_large_run_is_searched_as_a_small_one_that_takes_as_long() -> None:
    config = make_config("prompts.prompts_per_step=512", "learner.micro_batch_tokens=4096")
    rates = make_rates(
        rollout=RolloutRates(((1, 0.005), (32, 0.01)), (10.0,), LogNormal(150.0, 0.6, 500)),
        teachers={"main": TeacherRates(20_000.0)},
    )
    plan = find_split(config, rates, 16)
    assert plan.scale == 2
    small = min(found.mean_step_seconds for found in plan.tried)
    assert plan.best.mean_step_seconds == pytest.approx(small, rel=0.1)


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpus 5: .* the 4 ranks of learner.num_workers take 6; plan with"):
        find_split(make_config("learner.num_workers=4"), make_rates(), 5)


def test_two_teachers_get_gpus_by_their_load() -> None:
    config = make_config("teachers.second.model=x", "prompts.prompts_per_step=64", "rollout.rows_per_batch=2")
    teachers = {"main": TeacherRates(1000.0, share=0.8), "second": TeacherRates(1000.0, share=0.2)}
    split = find_split(config, make_rates(teachers=teachers), 12).best.split
    assert split.teachers["main"] >= 2 * split.teachers["second"]


def test_a_learner_that_takes_nearly_all_gpus_keeps_its_ranks() -> None:
    config = make_config("prompts.prompts_per_step=512", "learner.num_workers=10")
    assert str(find_split(config, make_rates(), 12).best.split) == "rollout=1 teachers.main=1 learner=10"
