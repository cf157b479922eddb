"""`python -m benchmarks.cases.dashboard_queries`: does every query of the Grafana dashboard find figures of a real run?

Starts the embedded run and a Prometheus (from PATH) that reads the endpoints which Ray names, and asks the queries of
the Grafana dashboard as Grafana would, until all have an answer or the time is up. `--discovery FILE` looks at a run
that goes on elsewhere: FILE is `prom_metrics_service_discovery.json` in its Ray's temporary folder.
Rows: queries with and without an answer; lines of the dashboard whose values are not finite or out of their range.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from benchmarks.harness.grafana import DASHBOARD
from benchmarks.harness.process_trees import descendants, end
from benchmarks.harness.prometheus import SCRAPE_SECONDS, Prometheus, prometheus
from benchmarks.harness.report import RESULTS, Row, at_least, at_most, print_rows, row, write_rows

DISCOVERY = "prom_metrics_service_discovery.json"
START_SECONDS = 200.0
# As Grafana fills them in for all runs; a rate needs several scrapes.
VARIABLES = {"$run": ".+", "$__rate_interval": f"{8 * SCRAPE_SECONDS}s"}
# A run that has every figure, and goes on until it has been looked at.
OWN_RUN = (
    "run.steps=100000",
    "run.name=run",
    "prompts.prompts_per_step=32",
    "evaluation.every_steps=5",
    "evaluation.num_prompts=64",
    "evaluation.teacher_too=false",
    "checkpoint.every_steps=5",
    "rollout.stop_repetition=8",
)
METRIC = re.compile(r"ray_preceptor_(\w+)\{")
SHARES = ("accuracy", "_share", "_ratio", "topk_mass")  # of a whole: from 0 to 1
ROUNDING = 1e-6
OF_EITHER_SIGN = ("loss", "reward")


@dataclass(frozen=True)
class Found:
    """What the dashboard's queries gave."""

    values: Mapping[str, Sequence[float]]  # by query

    def silent(self) -> list[str]:
        """Return the queries without an answer."""
        return [query for query, values in self.values.items() if not values]

    def odd(self) -> list[str]:
        """Return the queries with a value that cannot be."""
        return [query for query, values in self.values.items() if not all(is_sane(query, value) for value in values)]


def is_sane(query: str, value: float) -> bool:
    """Return whether a value can be one of this query's figure: finite, not negative, a share not above 1.

    Example:
        >>> is_sane('max by (run) (ray_preceptor_held_out_accuracy{run=~"$run"})', 1.5)
        False
    """
    metric = METRIC.findall(query)[0]
    lowest = -math.inf if metric in OF_EITHER_SIGN else 0.0
    highest = 1.0 + ROUNDING if metric.endswith(SHARES) else math.inf
    return math.isfinite(value) and lowest <= value <= highest


def dashboard_queries() -> list[str]:
    """Return every query of the dashboard's file."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def fill_in(query: str) -> str:
    """Return a query with Grafana's variables filled in.

    Example:
        >>> fill_in('rate(ray_preceptor_steps_total{run=~"$run"}[$__rate_interval])')
        'rate(ray_preceptor_steps_total{run=~".+"}[40s])'
    """
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    return query


def ask_all(server: Prometheus, seconds: float) -> Found:
    """Ask every query until all have an answer that can be, or the time is up.

    A rate is 0, and a quantile of it no number, while a series has not grown between two scrapes.
    """
    deadline = time.monotonic() + seconds
    while True:
        if server.is_ready():
            values = {query: [value for _, value in server.query(fill_in(query))] for query in dashboard_queries()}
            found = Found(values)
            missing = [*found.silent(), *found.odd()]
            print(f"{len(values) - len(missing)} of {len(values)} queries have an answer", flush=True)
            if not missing or time.monotonic() > deadline:
                return found
        time.sleep(SCRAPE_SECONDS)


@contextmanager
def own_run() -> Iterator[Path]:
    """Train the embedded student, and yield the file in which Ray names its endpoints."""
    with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as folder, (Path(folder) / "output").open("w+") as output:
        command = [sys.executable, "-m", "cluster.cli", "demo", f"run.directory={folder}/runs", *OWN_RUN]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "TMPDIR": folder}
        )
        try:
            yield _first_steps(process, Path(folder))
        finally:
            family = descendants(process.pid)
            process.send_signal(signal.SIGINT)
            end(family)
            output.seek(0)
            sys.stderr.write(output.read())


def _first_steps(process: "subprocess.Popen[bytes]", folder: Path) -> Path:
    deadline = time.monotonic() + START_SECONDS
    figures = folder / "runs/run/metrics.jsonl"
    while not (figures.exists() and figures.stat().st_size > 0):
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("dashboard queries: the run did not come to its first step")
        time.sleep(1.0)
    [discovery] = folder.glob(f"preceptor-*/ray/{DISCOVERY}")
    return discovery


def rows_of(found: Found, size: str) -> list[Row]:
    """Make the table."""
    total, silent, odd = len(found.values), found.silent(), found.odd()
    series = sum(len(values) for values in found.values.values())
    return [
        at_least(row("dashboard: queries with an answer", size, total - len(silent), "queries"), total),
        at_most(row("dashboard: queries with a value that cannot be", size, len(odd), "queries"), 0),
        row("dashboard: series found", size, series, "series"),
        *(row(f"dashboard: no answer: {query}", size, 0, "series") for query in silent),
        *(row(f"dashboard: cannot be: {query}", size, len(found.values[query]), "series") for query in odd),
    ]


def main() -> int:
    """Ask and write the rows; exit code 1 when a query has no answer."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.dashboard_queries", description=__doc__)
    parser.add_argument("--discovery", type=Path, help="Ray's list of endpoints of a run that goes on elsewhere")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long a query may stay without an answer")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-dashboard.json")
    options = parser.parse_args()
    run = own_run() if options.discovery is None else nullcontext(options.discovery)
    with run as discovery, prometheus(discovery) as server:
        found = ask_all(server, options.seconds)
    rows = rows_of(found, "embedded pair" if options.discovery is None else "a run of its own")
    print_rows(rows)
    write_rows(options.output, "python -m benchmarks.cases.dashboard_queries", rows)
    return 0 if all(each["met"] for each in rows if "met" in each) else 1


if __name__ == "__main__":
    sys.exit(main())
