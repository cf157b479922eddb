"""What the benchmark of replay makes of the runs that it did."""

from typing import Any

import pytest

from benchmarks.cases.replay import ACCURACY_ARMS, RATE_ARMS, accuracy_rows, rate_rows


def outcome(part: str, arm: str, number: int, **values: Any) -> dict[str, Any]:
    known = {
        "seconds": 2.0,
        "tokens": 1000,
        "bytes": 500.0,
        "record_seconds": 0.02,
        "accuracy": 0.5,
        "left_out": 0.1,
        "cpu_seconds": 2.0,
    }
    return {"part": part, "arm": arm, "number": number, "learn_seconds": 1.0, **known, **values}


def test_rates_are_compared_within_their_round() -> None:
    """The second round's machine is half as fast; a third round without all arms does not count."""
    seconds = {
        "live": 2.0,
        "live, recorded": 2.0,
        "replayed, recorded signals": 0.5,
        "replayed, recomputed signals": 1.0,
    }
    done = [outcome("rate", arm, n, seconds=seconds[arm] * (1 + n)) for n in (0, 1) for arm in RATE_ARMS]
    rows = {one["name"]: one for one in rate_rows([*done, outcome("rate", "live", 2)])}
    assert rows["replayed, recorded signals: of the live rate"]["value"] == 4.0
    assert rows["replayed, recorded signals: of the live rate"]["met"]
    assert rows["replayed, recomputed signals: of the live rate"]["value"] == 2.0
    cost = rows["recording: its thread and the loop's wait, of the time"]
    assert (cost["value"], cost["met"]) == (pytest.approx(0.0075), True)
    assert rows["recording: bytes on disk per completion token"]["value"] == 0.5
    assert rate_rows([]) == []


def test_accuracies_are_of_all_seeds() -> None:
    arm = next(iter(ACCURACY_ARMS))
    rows = accuracy_rows([outcome("accuracy", arm, seed, accuracy=0.4 + seed / 10) for seed in (1, 0)])
    assert [one["value"] for one in rows] == [pytest.approx(0.45), 2.0, 1000]
    assert "seeds 0, 1: 0.400, 0.500" in rows[0]["size"]
