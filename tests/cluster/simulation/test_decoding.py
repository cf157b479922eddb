import pytest

from cluster.simulation.simulated_cluster import SimulatedTime
from cluster.simulation.simulated_workers import Decoding

ALIKE = ((1, 0.1),)  # 0.1 s per token, however many run
CROWDED = ((1, 0.1), (2, 0.2))  # twice as long for two


def ends(points: tuple[tuple[int, float], ...], most_running: int, *asked: tuple[float, int, int]) -> dict[int, float]:
    """Return when each sequence is finished: of those asked for at a time, with a length and a priority."""
    time, found = SimulatedTime(), {}
    decoding = Decoding(time, points, most_running)

    def ask(index: int, length: int, priority: int) -> None:
        decoding.write(length, priority, lambda: found.update({index: round(time.now, 9)}))

    for index, (at, length, priority) in enumerate(asked):
        time.at(at, lambda index=index, length=length, priority=priority: ask(index, length, priority))
    time.spend(1000.0)
    return found


def test_a_sequence_takes_its_tokens_times_the_pace() -> None:
    assert ends(ALIKE, 8, (0.0, 30, 0)) == {0: 3.0}


def test_what_does_not_fit_waits_for_a_place() -> None:
    assert ends(ALIKE, 1, (0.0, 30, 0), (0.0, 10, 0)) == {0: 3.0, 1: 4.0}


def test_of_those_that_wait_an_earlier_step_comes_first() -> None:
    assert ends(ALIKE, 1, (0.0, 10, 0), (0.0, 10, 7), (0.5, 10, 3)) == {0: 1.0, 2: 2.0, 1: 3.0}


def test_two_sequences_slow_each_other_down_while_both_run() -> None:
    # Both get 10 tokens in 2 s; the long one then has 20 left, at 0.1 s each.
    assert ends(CROWDED, 8, (0.0, 10, 0), (0.0, 30, 0)) == {0: 2.0, 1: 4.0}


def test_a_newcomer_slows_down_what_runs() -> None:
    # Ten tokens in the first second, alone; then both need 10 more at 0.2 s.
    assert ends(CROWDED, 8, (0.0, 20, 0), (1.0, 10, 0)) == {0: 3.0, 1: 3.0}


def test_nothing_is_written_during_a_pause() -> None:
    time, found = SimulatedTime(), []
    decoding = Decoding(time, ALIKE, 8)
    decoding.write(30, 0, lambda: found.append(time.now))
    time.at(1.0, lambda: decoding.pause(5.0))
    time.spend(100.0)
    assert found == [pytest.approx(8.0)]
    assert decoding.busy_seconds == pytest.approx(3.0)


def test_a_sequence_ends_even_when_the_clock_is_too_late_to_show_its_seconds() -> None:
    time, found = SimulatedTime(), []
    decoding = Decoding(time, ((1, 1e-6),), 8)
    time.at(1e15, lambda: decoding.write(30, 0, lambda: found.append(time.now)))
    time.spend(2e15)
    assert found == [1e15]
