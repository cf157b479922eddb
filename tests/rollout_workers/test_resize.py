"""A pool grows and shrinks while it writes; on actors without engines."""

from collections import Counter
from collections.abc import Iterator

import pytest

from cluster.actors.cluster import RAY
from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutPool
from tests.rollout_workers.deployment import NUM_PROMPTS
from tests.rollout_workers.test_failover import start

SAMPLING = SamplingSettings(64, 1.0)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Iterator[RolloutPool]:
    with start(tmp_path_factory.mktemp("orders"), num_workers=2) as pool:
        pool.bring_weights_with(lambda actor: actor.bring.remote(7))
        yield pool


@pytest.fixture
def pool(shared: RolloutPool) -> RolloutPool:
    """Return an idle pool of two workers, whatever size an earlier test left it with."""
    shared.resize(2)
    shared.maintain()
    wait_for_workers(shared, 2)
    return shared


def submit(pool: RolloutPool, step: int, count: int, tokens: int = 5) -> None:
    requests = tuple(RolloutRequest(number, number % NUM_PROMPTS, 0, seed=tokens) for number in range(count))
    pool.submit(step, requests, SAMPLING)


def collect(pool: RolloutPool, count: int) -> list[BatchHandle]:
    """Return the batches of so many rows, in the order in which they came."""
    handles: list[BatchHandle] = []
    while len(handles) < count:
        handles += pool.collect(RAY.wait_for_any(pool.maintain, 120, pool.late))
    return handles


def writers(handles: list[BatchHandle]) -> Counter[str]:
    """Return how many rows each worker wrote."""
    return Counter(handle.spans[0].worker for handle in handles)


def wait_for_workers(pool: RolloutPool, count: int) -> None:
    """Wait until so many workers of an idle pool have started."""
    while len(pool.state().serving) < count:
        assert pool.collect(RAY.wait_for_any(pool.maintain, 120, pool.late)) == []


# The first: later, workers that were brought weights stand in for those of the beginning.
def test_new_workers_write_with_the_weights_that_they_were_brought(pool: RolloutPool) -> None:
    pool.resize(3)
    wait_for_workers(pool, 3)
    submit(pool, 0, 24)
    handles = collect(pool, 24)
    # The first two were brought nothing; of eight prompts with three samples each, nobody has fewer than two.
    versions = Counter(handle.min_policy_versions for handle in handles)
    assert set(versions) == {(0,), (7,)}
    assert versions[(7,)] in (6, 9)


def test_twice_as_many_workers_have_half_as_many_rows_each_and_write_at_the_same_time(pool: RolloutPool) -> None:
    for size in (2, 4):
        pool.resize(size)
        wait_for_workers(pool, size)
        submit(pool, size, 40, tokens=20)
        handles = collect(pool, 40)
        assert list(writers(handles).values()) == [40 // size] * size
        spans = {handle.spans[0].worker: handle.spans[0] for handle in reversed(handles)}  # of each one's first row
        assert max(span.began for span in spans.values()) < min(span.ended for span in spans.values())


def test_workers_that_leave_write_what_they_were_given(pool: RolloutPool) -> None:
    submit(pool, 0, 24)
    pool.resize(1)
    assert pool.size == 1
    handles = collect(pool, 24)
    assert sorted(key for handle in handles for key in handle.trajectory_ids) == list(range(24))
    pool.maintain()
    assert len(pool.actors) == 1


def test_who_leaves_is_asked_for_nothing_new(pool: RolloutPool) -> None:
    pool.resize(1)
    submit(pool, 0, 8)
    assert writers(collect(pool, 8)) == Counter({"writer-0": 8})


def test_a_pool_that_grows_and_shrinks_while_it_writes_loses_nothing(pool: RolloutPool) -> None:
    submit(pool, 0, 40)
    found: list[BatchHandle] = []
    for size in (4, 1, 3, 2):
        pool.resize(size)
        found += collect(pool, 10)
    assert sorted(key for handle in found for key in handle.trajectory_ids) == list(range(40))
