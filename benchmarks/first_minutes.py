"""`python -m benchmarks.first_minutes FOLDER`: what says most about a new GPU, step after step, in eight minutes.

Each step is a program of its own with a limit; one whose packages are missing is left out, and none begins after the
time is over. Logs and rows are in FOLDER, where `summary.json` is whole at any time. Exit code 1 when a step failed.
`--dry-run` does the same on a CPU: benchmarks with tiny models, and tests collected but not run.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import interrupt, missing_packages
from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import Row, print_rows, row, write_rows

COMMAND = "python -m benchmarks.first_minutes"
ALL_SECONDS = 470.0
LEAST_SECONDS = 20.0  # a step does not begin with less
LONGER = 2.0  # times the expected seconds after which a step is ended
PYTEST = ("pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Step:
    """Says what is run, and what it takes."""

    name: str
    command: tuple[str, ...]  # of `python -m`
    seconds: float  # expected on an H200; no GPU has run it yet
    needs: tuple[str, ...] = ()  # packages beside torch and transformers

    def arguments(self, folder: Path, is_dry_run: bool) -> list[str]:
        """Return the command line behind `python -m`."""
        if self.command[0] == "benchmarks.gpu":
            return [*self.command, "--output", str(folder / f"{self.name}.json"), *["--dry-run"] * is_dry_run]
        return [*self.command, *["--collect-only"] * (is_dry_run and self.command[0] == "pytest")]


SYNC = "tests/gpu/test_weight_sync_on_gpu.py"
STEPS = (
    Step("kernel-tests", (*PYTEST, "tests/gpu/test_row_kernels_on_gpu.py"), 30),
    Step("losses", (*PYTEST, "tests/gpu/test_same_numbers_on_gpu.py", "-k", "losses"), 20),
    Step("first", ("benchmarks.gpu_first", "ipc", "heads", "gradients"), 30),
    Step("kernels", ("benchmarks.gpu", "--parts", "kernels", "learning"), 90),
    Step("zero", ("benchmarks.gpu_first", "zero"), 40, ("deepspeed",)),
    Step("weights", (*PYTEST, SYNC, "-k", "learners_card and bfloat16"), 70, ("ray", "vllm")),
    Step("loop", ("benchmarks.gpu", "--parts", "loop"), 180, ("ray", "vllm")),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps in their order while there is time; exit code 1 when one failed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="of all steps together")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.perf_counter() + options.seconds
    rows: list[Row] = []
    for step in STEPS:
        rows.append(_take(step, options.folder, deadline, options.dry_run))
        print_rows(rows[-1:])
        sys.stdout.flush()
        write_rows(options.folder / "summary.json", COMMAND, rows)
    return 0 if all(one.get("met", True) for one in rows) else 1


def _take(step: Step, folder: Path, deadline: float, is_dry_run: bool) -> Row:
    """Run one step and return its seconds; without a bar, it was left out for the reason that stands as its size."""
    missing, left = missing_packages(step.needs), deadline - time.perf_counter()
    if missing or left < LEAST_SECONDS:
        return row(step.name, f"left out: no {' and no '.join(missing) or 'time'}", 0.0, "s")
    limit = min(left, LONGER * step.seconds) if not is_dry_run else left
    began, log = time.perf_counter(), folder / f"{step.name}.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.arguments(folder.resolve(), is_dry_run)],
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            output.write(f"ended after {limit:.0f} s\n")
        finally:
            interrupt(process)
    took = row(step.name, f"expected {step.seconds:.0f} s on a GPU", time.perf_counter() - began, "s")
    return {**took, "bar": "exit code 0", "met": process.returncode == 0}


if __name__ == "__main__":
    sys.exit(main())
