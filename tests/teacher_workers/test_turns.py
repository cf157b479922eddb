"""Turns of teachers that share a slot, on a simulated clock; times are quarters, so that sums are exact."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_workers.time_sharing import LONGEST_TURN_SWITCHES, PATIENCE_SWITCHES, TurnOrder

TEACHERS = ("math", "code", "prose")


@dataclass(frozen=True)
class Request:
    arrives: float
    teacher: str
    seconds: float = 1.0


@dataclass
class Slot:
    """Does what TurnOrder decides, and writes down when each request began and who was woken when."""

    requests: Sequence[Request]
    switch_seconds: float
    now: float = 0.0
    began: dict[int, float] = field(default_factory=dict)
    woken: list[tuple[float, str]] = field(default_factory=list)

    def run(self) -> "Slot":
        turns = TurnOrder(TEACHERS, TEACHERS[0], self.switch_seconds, lambda: self.now)
        coming = sorted(range(len(self.requests)), key=lambda index: self.requests[index].arrives)
        waiting: dict[str, list[int]] = {teacher: [] for teacher in TEACHERS}
        running: list[tuple[float, int]] = []  # end, request
        while len(self.began) < len(self.requests) or running:
            while coming and self.requests[coming[0]].arrives <= self.now:
                request = coming.pop(0)
                turns.arrive(self.requests[request].teacher)
                waiting[self.requests[request].teacher].append(request)
            for end, request in [found for found in running if found[0] <= self.now]:
                running.remove((end, request))
                turns.finish()
            for _ in range(turns.admit()):
                request = waiting[turns.awake].pop(0)
                self.began[request] = self.now
                running.append((self.now + self.requests[request].seconds, request))
            assert {self.requests[request].teacher for _, request in running} <= {turns.awake}
            due = turns.due()
            if due is not None:
                assert not running
                self.now += self.switch_seconds
                turns.switched(due, self.switch_seconds)
                self.woken.append((self.now, due))
                continue
            left = turns.seconds_left()
            moments = [end for end, _ in running] + [self.requests[request].arrives for request in coming[:1]]
            moments += [] if left is None else [self.now + left]
            if not moments:
                break
            assert min(moments) > self.now, "time stands still"
            self.now = min(moments)
        return self

    def check(self) -> None:
        """Check that everything was done, and that nobody waited for longer than all others' turns and its own."""
        assert len(self.began) == len(self.requests), "somebody waits for ever"
        longest = max((request.seconds for request in self.requests), default=0)
        turn = (LONGEST_TURN_SWITCHES + 1) * self.switch_seconds + longest
        for index, request in enumerate(self.requests):
            assert self.began[index] - request.arrives <= len(TEACHERS) * turn


quarters = st.integers(0, 400).map(lambda number: number / 4)
requests = st.lists(
    st.builds(Request, quarters, st.sampled_from(TEACHERS), st.integers(1, 40).map(lambda number: number / 4)),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(requests, st.sampled_from([0.0, 1.0, 4.0, 16.0]))
def test_every_request_gets_its_turn_within_bounds(found: list[Request], switch_seconds: float) -> None:
    Slot(found, switch_seconds).run().check()


def test_every_order_of_few_requests_ends() -> None:
    kinds = [(teacher, moment) for teacher in TEACHERS for moment in (0.0, 1.0, 12.0)]
    for chosen in product(kinds, repeat=3):
        for switch_seconds in (0.0, 1.0):
            Slot([Request(moment, teacher, 0.5) for teacher, moment in chosen], switch_seconds).run().check()


def test_what_is_there_from_the_beginning_is_done_teacher_by_teacher() -> None:
    slot = Slot([Request(0.0, teacher) for _ in range(5) for teacher in TEACHERS], switch_seconds=4.0).run()
    assert [teacher for _, teacher in slot.woken] == ["code", "prose"]
    # The first rests a quarter of a switch, in case more comes; then one switch each, and again such a rest.
    assert slot.woken == [(1 + 1 + 4.0, "code"), (6 + 1 + 1 + 4.0, "prose")]


def test_two_busy_teachers_switch_no_more_often_than_one_in_ten_switches_time() -> None:
    stream = [Request(moment / 4, teacher, 0.25) for moment in range(400) for teacher in ("math", "code")]
    slot = Slot(stream, switch_seconds=1.0).run()
    slot.check()
    ends = [moment for moment, _ in slot.woken if moment < 100]  # while requests came
    assert len(ends) >= 8
    assert all(later - earlier >= LONGEST_TURN_SWITCHES for earlier, later in pairwise(ends))


def test_a_short_pause_does_not_end_a_turn_and_a_long_one_does() -> None:
    waits = Request(0.0, "code")
    patience = PATIENCE_SWITCHES * 4
    short = Slot([Request(0.0, "math"), waits, Request(1 + patience - 0.25, "math")], 4.0).run()
    assert short.began[2] == 1 + patience - 0.25
    long = Slot([Request(0.0, "math"), waits, Request(1 + patience + 0.25, "math")], 4.0).run()
    assert long.woken[0] == (1 + patience + 4, "code")
    assert long.began[2] > long.began[1]


def test_who_waited_longest_is_next_and_nobody_twice_before_another() -> None:
    # Math is never out of work; what it has left when its turn ends is older than prose's only request.
    backlog = [Request(moment / 4, "math", 2.0) for moment in range(200)]
    slot = Slot([*backlog, Request(1.0, "code"), Request(30.0, "prose")], switch_seconds=1.0).run()
    assert [teacher for _, teacher in slot.woken][:3] == ["code", "math", "prose"]


@pytest.mark.parametrize("idle_seconds", [1.0, 50.0])
def test_an_idle_slot_switches_at_once(idle_seconds: float) -> None:
    slot = Slot([Request(idle_seconds, "code")], switch_seconds=4.0).run()
    assert slot.woken == [(idle_seconds + 4.0, "code")]
