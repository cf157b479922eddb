"""When finished trajectories leave a worker."""

import asyncio

import pytest

from cluster.contracts.requests import RolloutRequest
from rollout_workers import batching
from rollout_workers.batching import BEHIND_SECONDS, BatchSize, in_batches
from rollout_workers.contexts.groups import Attempt, GroupBarrier
from tests.builders import make_trajectory

LONG = 1.0  # seconds; far above what a machine under load adds to a short wait


async def write(trajectory_id: int, seconds: float, teacher: str = "only") -> Attempt:
    await asyncio.sleep(seconds)
    return Attempt(make_trajectory(trajectory_id=trajectory_id, prompt_id=trajectory_id, teacher=teacher))


def barrier(num_prompts: int, wait_seconds: float = LONG, waits: bool = False) -> GroupBarrier:
    """Hold nothing back, unless the completions of a prompt wait for each other."""
    requests = [RolloutRequest(number, number, 0, seed=0) for number in range(num_prompts)]
    return GroupBarrier(requests, wait_seconds, lambda route: waits)


def run(*completions: tuple[int, float, str], rows_per_batch: int) -> list[tuple[list[int], bool, bool]]:
    """Return the ids of each batch, whether it was the last, and whether it came while something was still written."""

    async def scenario() -> list[tuple[list[int], bool, bool]]:
        tasks = [asyncio.create_task(write(*completion)) for completion in completions]
        return [
            ([attempt.trajectory.trajectory_id for attempt, _ in rows], is_last, not all(task.done() for task in tasks))
            async for rows, is_last in in_batches(tasks, BatchSize(rows_per_batch), barrier(len(tasks)))
        ]

    return asyncio.run(scenario())


def test_a_full_batch_leaves_while_others_are_written() -> None:
    batches = run((0, 0.0, "a"), (1, 0.0, "a"), (2, LONG, "a"), rows_per_batch=2)
    assert batches == [([0, 1], False, True), ([2], True, False)]


def test_a_batch_that_does_not_fill_leaves_before_the_last_completion() -> None:
    batches = run((0, 0.0, "a"), (1, LONG, "a"), rows_per_batch=2)
    assert batches == [([0], False, True), ([1], True, False)]


def test_rows_that_finish_together_leave_together() -> None:
    assert run((0, 0.0, "a"), (1, 0.0, "a"), rows_per_batch=8) == [([0, 1], True, False)]


def test_what_is_left_of_several_teachers_leaves_apart_and_only_the_last_says_so() -> None:
    assert run((0, 0.0, "a"), (1, 0.0, "b"), rows_per_batch=8) == [([0], False, False), ([1], True, False)]


def test_a_rollouts_early_batches_grow_with_the_logarithm_of_its_time() -> None:
    # A completion every 10 ms for 0.6 s; a fixed wait of 10 ms would make 30 batches or more.
    completions = [(index, 0.01 * index, "a") for index in range(60)]
    assert len(run(*completions, rows_per_batch=1000)) < 25


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a clock that only the test moves on; rows that have finished are there at once."""
    now = [0.0]
    monkeypatch.setattr(batching, "perf_counter", lambda: now[0])
    return now


def sizes_when_each_batch_is_requested_after(seconds: float, clock: list[float]) -> list[int]:
    async def scenario() -> list[int]:
        tasks = [asyncio.create_task(write(index, 0.0)) for index in range(23)]
        sizes = []
        async for rows, _ in in_batches(tasks, BatchSize(2), barrier(len(tasks))):
            sizes.append(len(rows))
            clock[0] += seconds
        return sizes

    return asyncio.run(scenario())


def test_batches_grow_up_to_four_times_while_the_driver_is_behind(clock: list[float]) -> None:
    assert sizes_when_each_batch_is_requested_after(2 * BEHIND_SECONDS, clock) == [2, 4, 8, 8, 1]


def test_batches_keep_their_size_though_many_rows_finish_at_once(clock: list[float]) -> None:
    assert sizes_when_each_batch_is_requested_after(0.0, clock) == [2] * 11 + [1]


def test_the_next_rollout_begins_with_the_size_that_the_driver_needs() -> None:
    size = BatchSize(2)
    size.adapt(2 * BEHIND_SECONDS, num_waiting=1)
    assert size.rows == 2  # no second batch had to wait
    size.adapt(2 * BEHIND_SECONDS, num_waiting=2)
    assert size.rows == 4
