from typing import Any

from cluster.simulation.simulated_cluster import SimulatedCluster, SimulatedReference, SimulatedTime


class Clerk:
    """A simulated worker that answers after as many seconds as it is told."""

    def __init__(self, time: SimulatedTime, name: str, *arguments: Any) -> None:
        self._time, self._answer = time, (name, *arguments)

    def answer(self, seconds: float) -> SimulatedReference:
        """Return the name and the arguments that it was made with."""
        reference = self._time.reference()
        self._time.at(self._time.now + seconds, lambda: reference.resolve(self._answer))
        return reference


def make_cluster(seconds_per_call: float = 0.0) -> tuple[SimulatedTime, SimulatedCluster]:
    time = SimulatedTime()
    actors = {"office:Clerk": lambda *arguments: Clerk(time, *arguments)}
    return time, SimulatedCluster(time, seconds_per_call, actors)


def test_events_happen_in_the_order_of_their_time_and_of_their_planning() -> None:
    (time, cluster), seen = make_cluster(), []
    last = time.reference()
    time.at(2.0, lambda: seen.append("second"))
    time.at(1.0, lambda: seen.append("first"))
    time.at(2.0, lambda: seen.append("third"))
    time.at(3.0, last.resolve)
    cluster.get(last, 1.0, "the end")
    assert (seen, time.now) == (["first", "second", "third"], 3.0)


def test_a_wait_of_no_seconds_lets_no_time_pass() -> None:
    time, cluster = make_cluster()
    ready, late = cluster.put("here"), time.reference()
    time.at(1.0, late.resolve)
    assert cluster.wait([ready, late], num_returns=2, timeout_seconds=0) == [ready]
    assert time.now == 0.0


def test_a_wait_of_any_seconds_ends_with_what_it_waits_for() -> None:
    time, cluster = make_cluster()
    late = time.reference()
    time.at(1e12, late.resolve)
    assert cluster.wait([late], num_returns=1, timeout_seconds=1.5) == [late]
    assert time.now == 1e12


def test_the_drivers_own_work_takes_time_in_which_workers_go_on() -> None:
    time = SimulatedTime()
    reference = time.reference()
    time.at(1.0, reference.resolve)
    time.spend(2.0)
    assert (reference.is_ready, time.now) == (True, 2.0)


def test_the_first_of_several_answers_ends_a_wait_for_any() -> None:
    time, cluster = make_cluster()
    early, late = time.reference(), time.reference()
    time.at(40.0, early.resolve)
    time.at(90.0, lambda: late.resolve("late"))
    assert cluster.wait_for_any(lambda: [late, early], timeout_seconds=1.0, waiting_for=str) == [early]
    assert cluster.get([late], 1.0, "an answer") == ["late"]
    assert time.now == 90.0


def test_actors_are_made_by_the_name_of_their_class_and_answer_in_simulated_time() -> None:
    time, cluster = make_cluster(seconds_per_call=0.25)
    clerks = cluster.create("office:Clerk", ["a", "b"], [(1,), (2,)], [{}, {}])
    assert cluster.call_all(clerks, "answer", 3.0, timeout_seconds=1.0, waiting_for="both") == [("a", 1), ("b", 2)]
    assert time.now == 3.5  # the second was called after 0.5 s
