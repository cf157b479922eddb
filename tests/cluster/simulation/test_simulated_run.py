from collections import Counter

import pytest

from cluster.config.run_config import Config
from cluster.contracts.requests import SamplingSettings
from cluster.run.flow import Flow
from cluster.simulation.rates import LearnerRates, LogNormal, Rates, RolloutRates, TeacherRates
from cluster.simulation.simulated_run import Demand, Split, build, simulate
from tests.builders import make_config
from tests.cluster.simulation.rates_builder import make_rates

ONE_EACH = Split(1, {"main": 1}, 1)
LONG_TAIL = RolloutRates(((1, 0.01), (8, 0.02)), (10.0,), LogNormal(60.0, 0.8, 400))


def four_rows(*overrides: str) -> Config:
    return make_config("prompts.prompts_per_step=4", "rollout.rows_per_batch=4", *overrides)


def step_seconds(config: Config, rates: Rates, split: Split = ONE_EACH, steps: int = 3) -> list[float]:
    found = simulate(config, rates, split, Demand(config, rates), steps)
    return [round(seconds, 6) for seconds in found.step_seconds]


def test_a_step_of_rows_that_run_together_is_writing_then_reading_then_learning() -> None:
    # 100 tokens at 10 ms; then 4 x 110 tokens at 1000/s; then at 10000/s.
    assert step_seconds(four_rows(), make_rates()) == [1.0 + 0.44 + 0.044] * 3


def test_the_parts_of_a_step_that_wait_for_all_rows_add_up() -> None:
    rates = make_rates(learner=LearnerRates(10_000.0, optimizer_seconds=0.5), sync_seconds=0.25)
    assert step_seconds(four_rows(), rates) == [1.0 + 0.44 + 0.044 + 0.5 + 0.25] * 3


def test_what_is_written_first_is_read_and_learned_from_meanwhile() -> None:
    config = four_rows("rollout.engine.max_concurrent_sequences=2", "rollout.rows_per_batch=2")
    # Two rows after 1 s, two after 2 s; of the former nothing is left to do by then.
    assert step_seconds(config, make_rates()) == [2.0 + 0.22 + 0.022] * 3


@pytest.mark.parametrize(
    ("fields", "learned_seconds"),
    [
        (("objective.preset=tail-topk", "objective.token_weights.teacher_shares=equal"), 0.044),
        # And every row is read once before, which takes the third of it that is no backward.
        (("objective.preset=thinking-machines", "objective.terms.main.baseline=batch_mean"), 0.044 * 4 / 3),
    ],
)
def test_what_needs_the_whole_step_learns_when_the_last_row_is_read(
    fields: tuple[str, ...], learned_seconds: float
) -> None:
    config = four_rows("rollout.engine.max_concurrent_sequences=2", "rollout.rows_per_batch=2", *fields)
    assert step_seconds(config, make_rates()) == pytest.approx([2.0 + 0.22 + learned_seconds] * 3, abs=1e-5)


def test_two_workers_write_two_rows_each() -> None:
    config = four_rows("rollout.engine.max_concurrent_sequences=2")
    split = Split(2, {"main": 2}, 1)
    assert step_seconds(config, make_rates(), split) == [1.0 + 0.22 + 0.044] * 3


def test_ranks_share_the_rows_of_a_round() -> None:
    assert step_seconds(four_rows(), make_rates(), Split(1, {"main": 1}, 2)) == [1.0 + 0.44 + 0.022] * 3


def test_a_teacher_reads_together_what_came_while_it_was_busy() -> None:
    rates = make_rates(teachers={"main": TeacherRates(1000.0, seconds_per_pass=0.1)})
    config = four_rows("rollout.rows_per_batch=1")
    # The first row alone; then the other three, which the learner reads when they are done.
    assert step_seconds(config, rates)[0] == pytest.approx(1.0 + (0.1 + 0.11) + (0.1 + 0.33) + 0.033)


def test_a_teacher_reads_no_more_at_a_time_than_its_budget() -> None:
    rates = make_rates(teachers={"main": TeacherRates(1000.0, seconds_per_pass=0.1)})
    config = four_rows("rollout.rows_per_batch=1", "teachers.main.engine.max_batched_tokens=110")
    # Each row is learned from while the next one is read.
    assert step_seconds(config, rates)[0] == pytest.approx(1.0 + 4 * (0.1 + 0.11) + 0.011)


def test_one_step_of_staleness_hides_what_follows_generation() -> None:
    strict, ahead = (step_seconds(four_rows(f"rollout.max_staleness={bound}"), make_rates())[-1] for bound in (0, 1))
    assert strict == 1.484
    # The next step's rows are being written while this one's are read; 1 s of writing is what is left.
    assert ahead == pytest.approx(1.0, abs=0.05)


def test_every_call_takes_the_driver_its_time() -> None:
    # start_rollout, score, accumulate, take_step and publish_weights, none of which the others hide.
    assert step_seconds(four_rows(), make_rates(seconds_per_call=0.001)) == pytest.approx([1.484 + 0.005] * 3)


def test_simulated_steps_are_the_same_each_time() -> None:
    config = make_config("prompts.prompts_per_step=48", "rollout.max_staleness=1")
    rates = make_rates(rollout=LONG_TAIL)
    split = Split(3, {"main": 2}, 2)
    assert step_seconds(config, rates, split, 5) == step_seconds(config, rates, split, 5)


def test_every_row_is_learned_from_exactly_once() -> None:
    config = make_config("prompts.prompts_per_step=40", "rollout.samples_per_prompt=2", "rollout.max_staleness=1")
    rates = make_rates(rollout=LONG_TAIL)
    demand = Demand(config, rates)
    run = build(config, rates, Split(3, {"main": 2}, 1), demand)
    flow = Flow(run.rollouts, run.teachers, 1e9)
    steps = [flow.admit(step, demand.requests(step), SamplingSettings(400, 1.0), config.scorers) for step in range(3)]
    for step, batches in enumerate(steps):
        run.learner.step(batches, step)
    learned = Counter(
        trajectory_id for batches in steps for handle in batches.finished for trajectory_id in handle.trajectory_ids
    )
    assert learned == Counter(range(3 * 80))
    tokens = sum(
        row.prompt_tokens + row.completion_tokens
        for step in range(3)
        for row in map(demand.trajectory, demand.requests(step))
    )
    assert run.busy_seconds()["learner"] == pytest.approx(tokens / 10_000)
    assert run.busy_seconds()["teachers.main"] == pytest.approx(tokens / 1000)


def test_the_teachers_get_their_shares_of_the_rows() -> None:
    config = make_config("teachers.second.model=x", "prompts.prompts_per_step=400")
    rates = make_rates(teachers={"main": TeacherRates(1.0, share=0.75), "second": TeacherRates(1.0, share=0.25)})
    demand = Demand(config, rates)
    rows = Counter(demand.trajectory(request).teacher for request in demand.requests(0))
    assert rows["main"] == pytest.approx(300, abs=2)
    assert rows["second"] == 400 - rows["main"]


def test_idle_shares_are_what_is_left_of_a_step() -> None:
    config = four_rows()
    found = simulate(config, make_rates(), ONE_EACH, Demand(config, make_rates()), 3)
    assert found.idle_shares["rollout"] == pytest.approx(1 - 1 / 1.484)
    assert found.idle_shares["teachers.main"] == pytest.approx(1 - 0.44 / 1.484)
    assert found.idle_shares["learner"] == pytest.approx(1 - 0.044 / 1.484)
    assert found.completion_tokens_per_second == pytest.approx(400 / 1.484)


def test_calls_to_rollout_workers_say_how_long_each_completion_was() -> None:
    config = four_rows()
    rates = make_rates(rollout=LONG_TAIL)
    demand = Demand(config, rates)
    run = build(config, rates, ONE_EACH, demand)
    sampling = SamplingSettings(400, 1.0)
    handles = list(run.rollouts.generate(demand.requests(0), sampling))
    said = {
        row: length
        for found in handles
        for row, length in zip(found.trajectory_ids, found.spans[0].lengths, strict=True)
    }
    assert said == {
        request.trajectory_id: demand.trajectory(request).completion_tokens for request in demand.requests(0)
    }
