"""Every run of up to six steps, resumed anywhere, with every staleness up to beyond its length."""

from itertools import product

import pytest

from cluster.run.driver import Permits

RUNS = [(first, steps, staleness) for steps, staleness in product(range(1, 7), range(8)) for first in range(steps)]


@pytest.mark.parametrize(("first_step", "num_steps", "max_staleness"), RUNS)
def test_permits_admit_each_step_once_in_time_and_never_too_far_ahead(
    first_step: int, num_steps: int, max_staleness: int
) -> None:
    permits = Permits(first_step, num_steps, max_staleness)
    weights_at_admission: dict[int, int] = {}
    for step in range(first_step, num_steps):  # `step` updates have been made when step `step` is learned from
        for admitted in permits.admit(step):
            assert admitted not in weights_at_admission
            weights_at_admission[admitted] = step
        in_flight = [admitted for admitted in weights_at_admission if admitted >= step]
        assert step in in_flight
        assert len(in_flight) <= max_staleness + 1
        assert step - weights_at_admission[step] <= max_staleness
    assert sorted(weights_at_admission) == list(range(first_step, num_steps))


def test_asking_twice_for_the_same_step_admits_nothing_new() -> None:
    permits = Permits(first_step=0, num_steps=5, max_staleness=2)
    assert list(permits.admit(0)) == [0, 1, 2]
    assert list(permits.admit(0)) == []
    assert list(permits.admit(1)) == [3]
