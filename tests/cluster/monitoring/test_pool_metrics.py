import pytest

from cluster.contracts.batches import PoolState, Span
from cluster.monitoring.observers import PoolMetrics


def call(worker: str, began: float, ended: float, num_tokens: int = 0, num_rows: int = 1) -> Span:
    return Span("teacher-main", worker, "score", began, ended, num_rows, num_tokens)


def pool(*serving: str, num_wanted: int) -> PoolState:
    return PoolState("teacher-main", serving, num_wanted, num_restarts=3)


def looking_at(*times: float) -> PoolMetrics:
    clock = iter((0.0, *times))
    return PoolMetrics(lambda: next(clock))


def test_a_moment_counts_once_however_many_calls_overlap() -> None:
    calls = [call("a", 0.0, 4.0), call("a", 1.0, 3.0), call("a", 3.0, 6.0), call("a", 8.0, 9.0)]
    found = looking_at(10.0).measure(calls, [pool("a", num_wanted=1)])
    assert found["pool/teacher-main/busy_share"] == pytest.approx(0.7)
    assert found["pool/teacher-main/idle_share"] == pytest.approx(0.3)


def test_a_call_that_began_before_the_last_look_does_not_count_twice() -> None:
    figures = looking_at(10.0, 20.0)
    figures.measure([call("a", 0.0, 8.0)], [pool("a", num_wanted=1)])
    found = figures.measure([call("a", 5.0, 12.0)], [pool("a", num_wanted=1)])
    assert found["pool/teacher-main/busy_share"] == pytest.approx(0.4)  # from 8 s to 12 s


def test_a_worker_that_is_missing_is_idle() -> None:
    found = looking_at(10.0).measure([call("a", 0.0, 10.0)], [pool("a", num_wanted=2)])
    assert found["pool/teacher-main/busy_share"] == 0.5
    assert (found["pool/teacher-main/serving"], found["pool/teacher-main/wanted"]) == (1, 2)
    assert found["pool/teacher-main/restarts"] == 3


def test_tokens_are_counted_over_all_workers_and_never_for_calls_without_rows() -> None:
    calls = [call("a", 0.0, 1.0, num_tokens=300), call("b", 0.0, 1.0, num_tokens=200)]
    learned = Span("learner", "learner-0", "learn", 0.0, 1.0)
    pools = [pool("a", "b", num_wanted=2), PoolState("learner", ["learner-0"], 1, 0)]
    found = looking_at(10.0).measure([*calls, learned], pools)
    assert found["pool/teacher-main/tokens_per_second"] == 50.0
    assert "pool/learner/tokens_per_second" not in found
