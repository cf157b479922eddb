"""`python -m benchmarks.cases.demo`: runs `preceptor demo` as a user would and measures what a newcomer is promised.

Rows: held-out accuracy before and after, the teacher's, seconds until the first training step begins, training seconds,
seconds in all, and the peak of all its processes' memory together (proportional set size, so that shared pages count
once).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import date
from pathlib import Path

import psutil

from benchmarks.harness.report import RESULTS, Row, describe_machine, print_rows, row

SAMPLE_SECONDS = 1.0
MARK = "PRECEPTOR_BENCHMARK"  # in the environment of every process that the demo starts, whoever its parent is
BARS = {
    "student accuracy before": ("<=", 0.50),
    "student accuracy after": (">=", 0.87),
    "training": ("<=", 240.0),
    "before the first step": ("<=", 30.0),
    "demo in all": ("<=", 90.0),
    "peak memory": ("<=", 4.8),
}
FIRST_STEP = "held-out before training"  # begins the line after which training begins


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-demo.json")
    options, overrides = parser.parse_known_args()
    rows = measure_demo(overrides)
    print_rows(rows)
    described = {"command": "python -m benchmarks.cases.demo", **describe_machine()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


def measure_demo(overrides: list[str]) -> list[Row]:
    """Run the demo and return its rows."""
    mark = uuid.uuid4().hex
    started = time.perf_counter()
    peak_bytes, first_step = 0, 0.0
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-m", "cluster.cli", "demo", f"run.directory={directory}", *overrides]
        demo = subprocess.Popen(command, stdout=output, env={**os.environ, MARK: mark})
        while demo.poll() is None:
            peak_bytes = max(peak_bytes, memory_bytes(mark))
            if not first_step and FIRST_STEP in Path(f"/proc/self/fd/{output.fileno()}").read_text():
                first_step = time.perf_counter() - started
            time.sleep(SAMPLE_SECONDS)
        output.seek(0)
        text = output.read()
    seconds = time.perf_counter() - started
    if demo.returncode != 0:
        raise SystemExit(f"the demo failed with exit code {demo.returncode}")
    before, after, teacher = (float(value) for value in re.findall(r"\d\.\d\d", text.splitlines()[-1]))
    training = re.search(r"^(\d+) steps in (\d+) s$", text, re.MULTILINE)
    assert training is not None, "the demo prints this line"
    size = f"embedded pair, {training[1]} steps"
    rows = [
        row("student accuracy before", size, before, "ratio"),
        row("student accuracy after", size, after, "ratio"),
        row("teacher accuracy", size, teacher, "ratio"),
        row("before the first step", size, first_step, "s"),
        row("training", size, float(training[2]), "s"),
        row("demo in all", size, seconds, "s"),
        row("peak memory", size, peak_bytes / 1e9, "GB"),
    ]
    return [with_bar(found) for found in rows]


def memory_bytes(mark: str) -> int:
    """Return the memory of all processes that carry the mark."""
    total = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return total


def with_bar(found: Row) -> Row:
    """Add the bar that the figure has to meet, where there is one."""
    if found["name"] not in BARS:
        return found
    relation, bar = BARS[found["name"]]
    met = found["value"] <= bar if relation == "<=" else found["value"] >= bar
    return {**found, "bar": f"{relation} {bar:g}", "met": met}


if __name__ == "__main__":
    sys.exit(main())
