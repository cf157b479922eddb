"""`python -m benchmarks.cases.live_view`: what the view of a run at a terminal costs the thread of the loop.

Shows steps of a run with four pools on a terminal of 120 columns that goes nowhere. Rows: seconds that the loop spends
per step, the median and the slowest of a hundred; share of one core that drawing takes in its own thread meanwhile.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.harness.report import Row, at_most, print_rows, row, write_rows
from cluster.contracts.files import Record
from cluster.monitoring.sinks import LiveView

COMMAND = "python -m benchmarks.cases.live_view"
STEPS, PAUSE_SECONDS, IDLE_SECONDS = 500, 0.005, 10.0
OTHER_METRICS = 150  # of a step, which the view does not show
SIZE = f"{STEPS} steps, 4 pools"
MOST_SECONDS, MOST_SHARE = 1e-3, 0.02


def steps() -> Iterator[Record]:
    """Yield the metrics of each step."""
    pools = ("rollout", "teacher-a", "teacher-b", "learner")
    metrics = ("busy_share", "idle_share", "serving", "wanted", "restarts", "tokens_per_second")
    constant = {f"other/{place}": 1.0 for place in range(OTHER_METRICS)}
    constant |= {f"pool/{pool}/{metric}": 0.5 for pool in pools for metric in metrics}
    for step in range(1, STEPS + 1):
        yield {**constant, "step": step, "train/kl": 1.0 / step, "held_out/accuracy": 0.5, "held_out/kl": 1.0 / step}


def measure() -> list[Row]:
    """Show all steps, then wait while the view goes on."""
    seconds = []
    with Path(os.devnull).open("w") as terminal:
        view = LiveView(Console(file=terminal, force_terminal=True, width=120), "run", STEPS + 1)
        for record in steps():
            began = time.perf_counter()
            view.show(record)
            seconds.append(time.perf_counter() - began)
            time.sleep(PAUSE_SECONDS)
        worked, began = time.process_time(), time.perf_counter()
        time.sleep(IDLE_SECONDS)
        share = (time.process_time() - worked) / (time.perf_counter() - began)
        view.finish()
    slow = statistics.quantiles(seconds, n=100)[-1]
    return [
        at_most(row("live view: the loop, median", SIZE, statistics.median(seconds), "seconds a step"), MOST_SECONDS),
        at_most(row("live view: the loop, 99th percentile", SIZE, slow, "seconds a step"), MOST_SECONDS),
        at_most(row("live view: drawing, in its thread", SIZE, share, "of one core"), MOST_SHARE),
    ]


def main() -> int:
    """Measure and print the table; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    rows = measure()
    print_rows(rows)
    if options.output is not None:
        write_rows(options.output, COMMAND, rows)
    return 0 if all(one["met"] for one in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
