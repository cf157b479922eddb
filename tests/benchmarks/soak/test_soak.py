"""The soak notices what it is there to notice, and a short one finds nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.report import Row
from benchmarks.soak.__main__ import Ledger, memory_rows
from benchmarks.soak.actors import Delays
from benchmarks.soak.learner import LearnedRow, RankReport, WaitingLearner
from benchmarks.soak.memory import MemorySample
from cluster.contracts.trajectory import make_generated
from cluster.contracts.wire import to_wire
from learner.batching.arrivals import RankShare
from learner.batching.plan import Grid
from tests.builders import make_config, make_trajectory

ROOT = Path(__file__).resolve().parents[3]
NO_DELAYS = Delays(seed=0, mean_seconds=0.0, longest_seconds=0.0)


def counted(grid: Grid) -> Ledger:
    """Let a rank learn from a grid of the trajectories 10, 11, 12 and 13, of which each was asked once."""
    learner = WaitingLearner(make_config(), 0, 1, NO_DELAYS, fetch=list)
    batch = make_generated([make_trajectory(trajectory_id=10 + row) for row in range(4)])
    learner.accumulate(RankShare((to_wire(batch),), (0.0,) * 4, (grid,)), completes_step=True)
    learner.take_step(num_tokens=12, step=0)
    ledger = Ledger(max_staleness=2)
    ledger.check_step(0, [10, 11, 12, 13], [learner.report()])
    return ledger


def faults(ledger: Ledger) -> dict[str, int]:
    names = ("lost", "repeated", "uncalled", "too_old", "out_of_order")
    return {name: count for name in names if (count := getattr(ledger, name))}


def report(*staleness: int, first_id: int = 0, steps: tuple[int, ...] = (0,)) -> RankReport:
    return RankReport(tuple(LearnedRow(first_id + row, age) for row, age in enumerate(staleness)), steps)


def test_a_step_that_learns_from_every_row_once_has_no_fault() -> None:
    ledger = counted(((0, 1), (3, 2)))
    assert faults(ledger) == {}
    assert (ledger.steps, ledger.trajectories) == (1, 4)


def test_a_lost_row_is_noticed() -> None:
    assert faults(counted(((0, 1), (3,)))) == {"lost": 1}


def test_a_repeated_row_is_noticed() -> None:
    assert faults(counted(((0, 1), (3, 2, 1)))) == {"repeated": 1}


def test_a_row_repeated_on_another_rank_is_noticed() -> None:
    ledger = Ledger(max_staleness=2)
    ledger.check_step(0, [0, 1, 2], [report(0, 0), report(0, 0, first_id=1)])
    assert faults(ledger) == {"repeated": 1}


def test_a_row_learned_from_in_a_later_step_is_noticed_in_both() -> None:
    ledger = Ledger(max_staleness=2)
    ledger.check_step(0, [0, 1], [report(0)])
    ledger.check_step(1, [2], [report(0, 0, first_id=1, steps=(1,))])
    assert faults(ledger) == {"lost": 1, "uncalled": 1}


def test_a_row_older_than_the_bound_or_younger_than_the_weights_is_noticed() -> None:
    ledger = Ledger(max_staleness=2)
    ledger.check_step(0, [0, 1, 2, 3], [report(0, 2, 3, -1)])
    assert faults(ledger) == {"too_old": 2}
    assert ledger.largest_staleness == 3


@pytest.mark.parametrize("steps", [(), (1,), (0, 1)])
def test_a_rank_that_takes_another_step_than_the_next_is_noticed(steps: tuple[int, ...]) -> None:
    ledger = Ledger(max_staleness=2)
    ledger.check_step(0, [0], [report(0, steps=(0,)), report(steps=steps)])
    assert faults(ledger) == {"out_of_order": 1}


def rows_after(minutes: int, leaked_bytes_per_second: int) -> dict[str, Row]:
    """Return the rows of a soak whose object store grew, sampled every ten seconds."""
    samples = [
        MemorySample(second, 0, 10**9, 0, 0, leaked_bytes_per_second * second, 0)
        for second in range(0, 60 * minutes + 1, 10)
    ]
    return {found["name"]: found for found in memory_rows(samples, warm_up_seconds=60)}


def test_a_store_that_grows_misses_its_bar() -> None:
    rows = rows_after(minutes=11, leaked_bytes_per_second=2_000)
    grown = rows["soak: growth of the object store"]
    assert grown["value"] == pytest.approx(2_000 * 600 / 1e6)
    assert not grown["met"]
    assert rows["soak: growth of all heaps"]["met"]


def test_memory_is_not_judged_by_less_than_ten_minutes() -> None:
    assert "met" not in rows_after(minutes=10, leaked_bytes_per_second=2_000)["soak: growth of the object store"]


def test_delays_are_the_same_for_the_same_key_and_differ_for_every_other() -> None:
    delays = Delays(seed=1, mean_seconds=0.5, longest_seconds=3.0)
    drawn = [delays.seconds(stage, key) for stage in ("score", "batch") for key in range(500)]
    assert drawn == [delays.seconds(stage, key) for stage in ("score", "batch") for key in range(500)]
    uncut = [seconds for seconds in drawn if seconds < 3.0]
    assert len(set(uncut)) == len(uncut)
    assert max(drawn) == 3.0  # P(a delay is cut) = (1 + 3 / 0.25)^-1.5 = 2 %, of 1,000


@pytest.mark.slow
@pytest.mark.exhaustive
def test_twenty_seconds_of_random_delays_lose_and_repeat_nothing(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", "0.33", "--seed", "3", "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, found.stdout + found.stderr
    rows = {row["name"]: row["value"] for row in json.loads(output.read_text())["rows"]}
    assert rows["soak: lost"] == rows["soak: repeated"] == 0
    assert rows["soak: largest staleness"] == 2  # generation did run ahead
    assert rows["soak: trajectories"] >= 10 * 32
