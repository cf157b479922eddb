from cluster.actors.calls import Promise, answers_of, get_all, wait_for_any
from cluster.simulation.clock import SimulatedTime


def test_events_happen_in_the_order_of_their_time_and_of_their_planning() -> None:
    time, seen = SimulatedTime(), []
    last = time.promise()
    time.at(2.0, lambda: seen.append("second"))
    time.at(1.0, lambda: seen.append("first"))
    time.at(2.0, lambda: seen.append("third"))
    time.at(3.0, last.keep)
    time.get(last)
    assert (seen, time.now) == (["first", "second", "third"], 3.0)


def test_a_look_without_patience_lets_no_time_pass() -> None:
    time = SimulatedTime()
    ready, late = time.promise(), time.promise()
    ready.keep()
    time.at(1.0, late.keep)
    assert time.wait([ready, late], num_returns=2, timeout=0) == ([ready], [late])
    assert time.now == 0.0


def test_a_wait_with_any_patience_ends_with_what_it_waits_for() -> None:
    time = SimulatedTime()
    late = time.promise()
    time.at(1e12, late.keep)
    assert time.wait([late], num_returns=1, timeout=1.5) == ([late], [])
    assert time.now == 1e12


def test_the_drivers_own_work_takes_time_in_which_workers_go_on() -> None:
    time = SimulatedTime()
    promise = time.promise()
    time.at(1.0, promise.keep)
    time.spend(2.0)
    assert (promise.is_kept, time.now) == (True, 2.0)


def test_the_pools_wait_for_promises_as_they_do_for_references() -> None:
    time = SimulatedTime()
    early, late = time.promise(), time.promise()
    time.at(40.0, early.keep)
    time.at(90.0, lambda: late.keep("late"))
    assert wait_for_any(lambda: [late, early], timeout_seconds=1.0, waiting_for=str) == [early]
    assert get_all([late], 1.0, "an answer") == ["late"]
    assert time.now == 90.0


def test_other_references_are_rays() -> None:
    promise = SimulatedTime().promise()
    assert isinstance(promise, Promise)
    assert answers_of([promise]) is promise.answers
    assert answers_of([object()]).__name__ == answers_of([]).__name__ == "ray"  # type: ignore[attr-defined]
