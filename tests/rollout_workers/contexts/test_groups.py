"""A prompt's completions wait for each other, and each leaves once."""

import asyncio
import random

from cluster.contracts.requests import RolloutRequest
from rollout_workers.batching import BatchSize, Filling, in_batches
from rollout_workers.contexts.groups import Attempt, GroupBarrier, Released
from tests.builders import make_trajectory

SAMPLES = 4


def requests(num_prompts: int, samples: int = SAMPLES) -> list[RolloutRequest]:
    return [
        RolloutRequest(prompt * samples + sample, prompt, sample, seed=0)
        for prompt in range(num_prompts)
        for sample in range(samples)
    ]


def attempt(request: RolloutRequest) -> Attempt:
    fields = {"trajectory_id": request.trajectory_id, "sample_index": request.sample_index}
    return Attempt(make_trajectory(prompt_id=request.prompt_id, **fields))


def ids(released: list[Released]) -> list[tuple[int, list[int]]]:
    return [(one.trajectory.trajectory_id, [a.trajectory.sample_index for a in group]) for one, group in released]


def test_a_group_leaves_with_its_last_completion_and_in_the_order_of_the_samples() -> None:
    barrier = GroupBarrier(requests(2, samples=2), 5.0, lambda route: True)
    third, first, second, _ = (attempt(requests(2, samples=2)[index]) for index in (2, 1, 0, 3))
    assert (barrier.add(third, now=0.0), barrier.add(first, now=1.0), barrier.due_at) == ([], [], 5.0)
    assert ids(barrier.add(second, now=2.0)) == [(1, [0, 1]), (0, [0, 1])]


def test_at_its_time_a_group_leaves_with_what_is_there_and_the_late_ones_follow_by_themselves() -> None:
    first, second, third = requests(1, samples=3)
    barrier = GroupBarrier((first, second, third), 5.0, lambda route: True)
    assert (barrier.add(attempt(second), now=1.0), barrier.overdue(5.9)) == ([], [])
    assert ids(barrier.overdue(6.0)) == [(1, [1])]
    assert (barrier.due_at, barrier.add(attempt(third), now=7.0), barrier.due_at) == (None, [], 12.0)
    assert ids(barrier.add(attempt(first), now=8.0)) == [(2, [0, 1, 2]), (0, [0, 1, 2])]


def test_completions_of_other_routes_wait_for_nothing() -> None:
    barrier = GroupBarrier(requests(1), 5.0, lambda route: route == "other")
    assert ids(barrier.add(attempt(requests(1)[2]), now=0.0)) == [(2, [2])]


def run_worker(draw: random.Random, owed: list[RolloutRequest], dies: bool) -> tuple[list[int], bool]:
    """Return the trajectories that a worker sends, in batches, before it has none or dies.

    Completions finish in any order; some never do before the others' time is over.
    """
    barrier, filling = GroupBarrier(owed, 1.0, lambda route: True), Filling[Released](len(owed), 3, started=0.0)
    sent: list[int] = []
    now, left = 0.0, draw.sample(owed, len(owed))
    while left or filling.missing:
        if left and (draw.random() < 0.8 or barrier.due_at is None):
            now += 0.01
            released = barrier.add(attempt(left.pop()), now)
        else:
            assert barrier.due_at is not None
            now = max(now, barrier.due_at)
            released = barrier.overdue(now)
            assert released
        for one in released:
            batch = filling.add("main", one, now)
            sent += [sibling.trajectory.trajectory_id for sibling, _ in batch or []]
            if batch and dies and draw.random() < 0.5:
                return sent, True
    return [*sent, *(one.trajectory.trajectory_id for rows in filling.rest() for one, _ in rows)], False


def test_in_1000_random_orders_with_lost_siblings_and_deaths_every_row_is_released_exactly_once() -> None:
    num_deaths = 0
    for seed in range(1000):
        draw = random.Random(seed)
        owed, came = requests(draw.randint(1, 4), samples=draw.randint(1, 6)), list[int]()
        expected = [request.trajectory_id for request in owed]
        while owed:  # what a dead worker owes is requested again of another
            sent, has_died = run_worker(draw, owed, dies=draw.random() < 0.5)
            num_deaths += has_died
            came += sent
            owed = [request for request in owed if request.trajectory_id not in sent]
        assert sorted(came) == expected, seed
    assert num_deaths > 200


def test_a_worker_sends_a_group_when_it_is_whole_and_a_late_one_after_its_time() -> None:
    async def scenario() -> list[list[int]]:
        owed, sent = requests(2, samples=2), list[list[int]]()
        first_alone = asyncio.Event()

        async def write(request: RolloutRequest) -> Attempt:
            if request.trajectory_id == 1:
                await first_alone.wait()
            return attempt(request)

        tasks = [asyncio.create_task(write(request)) for request in owed]
        async for rows, _ in in_batches(tasks, BatchSize(2), GroupBarrier(owed, 0.3, lambda route: True)):
            sent.append([one.trajectory.trajectory_id for one, _ in rows])
            if sent[-1] == [0]:
                first_alone.set()
        return sent

    assert asyncio.run(scenario()) == [[2, 3], [0], [1]]
