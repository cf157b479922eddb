"""A pool grows and shrinks while it writes; on actors without engines."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.actors.cluster import RAY
from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutPool
from tests.rollout_workers.crashing_rollout import SECONDS_PER_TOKEN
from tests.rollout_workers.deployment import NUM_PROMPTS
from tests.rollout_workers.test_failover import start

SAMPLING = SamplingSettings(64, 1.0)
pytestmark = pytest.mark.alone


@pytest.fixture
def pool(tmp_path: Path, ray_cluster: None) -> Iterator[RolloutPool]:
    with start(tmp_path, num_workers=2) as pool:
        pool.bring_weights_with(lambda actor: actor.bring.remote(7))
        yield pool


def submit(pool: RolloutPool, step: int, count: int, tokens: int = 5) -> None:
    requests = tuple(RolloutRequest(number, number % NUM_PROMPTS, 0, seed=tokens) for number in range(count))
    pool.submit(step, requests, SAMPLING)


def collect(pool: RolloutPool, count: int) -> tuple[list[BatchHandle], NDArray[Any]]:
    """Return the batches of so many rows, and when each came."""
    handles: list[BatchHandle] = []
    times = []
    while len(handles) < count:
        for handle in pool.collect(RAY.wait_for_any(pool.maintain, 120, pool.late)):
            handles.append(handle)
            times.append(time.monotonic())
    return handles, np.array(times)


def wait_for_workers(pool: RolloutPool, count: int) -> None:
    """Wait until so many workers of an idle pool have started."""
    while len(pool.state().serving) < count:
        assert pool.collect(RAY.wait_for_any(pool.maintain, 120, pool.late)) == []


def test_twice_as_many_workers_write_almost_twice_as_fast(pool: RolloutPool) -> None:
    seconds = {}
    for size in (2, 4):
        pool.resize(size)
        wait_for_workers(pool, size)
        submit(pool, 10 + size, NUM_PROMPTS)
        collect(pool, NUM_PROMPTS)  # a new process takes its time over its first row
        submit(pool, size, 40, tokens=20)
        _, times = collect(pool, 40)
        seconds[size] = times[-1] - times[0]
    assert seconds[2] / seconds[4] > 1.8


def test_workers_that_leave_write_what_they_were_given(pool: RolloutPool) -> None:
    submit(pool, 0, 24)
    pool.resize(1)
    assert pool.size == 1
    handles, _ = collect(pool, 24)
    assert sorted(key for handle in handles for key in handle.trajectory_ids) == list(range(24))
    pool.maintain()
    assert len(pool.actors) == 1


def test_who_leaves_is_asked_for_nothing_new(pool: RolloutPool) -> None:
    pool.resize(1)
    submit(pool, 0, 8)
    _, times = collect(pool, 8)
    assert times[-1] - times[0] > 6 * 5 * SECONDS_PER_TOKEN  # one after the other


def test_new_workers_write_with_the_weights_that_they_were_brought(pool: RolloutPool) -> None:
    pool.resize(3)
    wait_for_workers(pool, 3)
    submit(pool, 0, 24)
    handles, _ = collect(pool, 24)
    # The first two were brought nothing; of eight prompts with three samples each, nobody has fewer than two.
    versions = Counter(handle.min_policy_versions for handle in handles)
    assert set(versions) == {(0,), (7,)}
    assert versions[(7,)] in (6, 9)


def test_a_pool_that_grows_and_shrinks_while_it_writes_loses_nothing(pool: RolloutPool) -> None:
    submit(pool, 0, 40)
    found: list[BatchHandle] = []
    for size in (4, 1, 3, 2):
        pool.resize(size)
        found += collect(pool, 10)[0]
    assert sorted(key for handle in found for key in handle.trajectory_ids) == list(range(40))
