"""Runs `make test` several times in a row beside processes that do nothing but use a core each.

`python -m tests.busy [--runs N] [--spinning N] [--output FILE]`. Ends at the first run that fails.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

from benchmarks.harness.report import write_rows

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Return 1 if a run fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.busy", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of `make test`")
    parser.add_argument("--spinning", type=int, default=2, help="processes that spin beside them")
    parser.add_argument("--output", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    spinning = [multiprocessing.Process(target=spin, daemon=True) for _ in range(arguments.spinning)]
    for process in spinning:
        process.start()
    rows: list[dict[str, object]] = []
    while len(rows) < arguments.runs and all(row["code"] == 0 for row in rows):
        rows.append(run_tests())
        print(f"{rows[-1]['seconds']:5.0f} s  {rows[-1]['summary']}", flush=True)
    assert all(process.is_alive() for process in spinning)
    if arguments.output:
        command = "python -m tests.busy " + " ".join(sys.argv[1:])
        write_rows(arguments.output, command.strip(), rows)
    return int(any(row["code"] for row in rows))


def spin() -> None:
    """Use a core until whoever started this has ended."""
    parent = os.getppid()
    while os.getppid() == parent:
        sum(range(100_000))


def run_tests() -> dict[str, object]:
    """Run `make test`, and return how it ended; a run that fails prints all of its output."""
    started = perf_counter()
    run = subprocess.run(["make", "test"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = round(perf_counter() - started)
    if run.returncode:
        print(run.stdout, flush=True)
    summary = [line for line in run.stdout.splitlines() if " passed" in line or " failed" in line]
    return {"seconds": seconds, "code": run.returncode, "summary": summary[-1].strip("= ") if summary else ""}


if __name__ == "__main__":
    sys.exit(main())
