"""`python -m benchmarks.cases.chaos --kills 50`: SIGKILL at random moments, and the run must not notice in the end.

Trains the embedded student twice: undisturbed, and with processes killed one after the other: rollout and teacher
actors, their engines, learner ranks, and the driver, which is then started again with `--resume`. The printed seed
decides who dies and when. Rows: kills, prompts consumed exactly once according to the ledger, held-out accuracy of both
runs.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import IO

from benchmarks.harness.kill_targets import DRIVER, kill, shares
from benchmarks.harness.process_trees import descendants, end
from benchmarks.harness.report import RESULTS, Row, at_least, at_most, print_rows, row, write_rows
from cluster.config.run_directory import RunDirectory
from cluster.demo import embedded_config
from cluster.run.inputs import load_inputs
from cluster.run.ledger import audit, read_ledger

PAUSE_SECONDS = 2.0  # longest wait between a step and the kill that follows it
CHECK_SECONDS = 0.2
STALL_SECONDS = 300.0  # without a step: the run hangs
STANDARD_DEVIATIONS = 3.0
# Two workers in each pool, so that one can do the work of the other.
DISTURBED = (
    "rollout.num_workers=2",
    "teachers.countdown.num_workers=2",
    "checkpoint.export=false",
    "evaluation.teacher_too=false",
    "ray.max_restarts=1000",
)


@dataclass
class ChaosRun:
    """One run of the embedded pair, and what is done to it."""

    directory: Path
    output: IO[str]
    overrides: Sequence[str]
    killed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Start the driver."""
        self.started = time.perf_counter()
        arguments = [f"run.directory={self.directory}", "run.name=run", *self.overrides]
        self._driver = self._start("demo", *arguments)

    @property
    def run(self) -> Path:
        """The run's own folder."""
        return self.directory / "run"

    def last_step(self) -> int:
        """Return the last step that was recorded, 0 before the first."""
        return int(last_record(self.run).get("step", 0))

    def has_ended(self) -> bool:
        """Return whether the driver is gone."""
        return self._driver.poll() is not None

    def wait_for_step(self) -> bool:
        """Wait until another step is recorded; False when the run is over first."""
        before, deadline = self.last_step(), time.monotonic() + STALL_SECONDS
        while self.last_step() == before:
            if self.has_ended():
                return False
            if time.monotonic() > deadline:
                raise SystemExit(f"chaos: no step for {STALL_SECONDS:.0f} s after step {before}")
            time.sleep(CHECK_SECONDS)
        return True

    def disturb(self, kind: str, chance: random.Random) -> None:
        """Kill a process of a kind; a driver's run is resumed."""
        if kind != DRIVER:
            self.killed[kind] += kill(kind, self._driver.pid, chance)
            return
        family = descendants(self._driver.pid)
        self._driver.kill()
        self._driver.wait()
        end(family)
        self.killed[kind] += 1
        self._driver = self._start("train", "--resume", str(self.run))

    def finish(self) -> int:
        """Wait for the end and return the driver's exit code."""
        while self.wait_for_step():
            pass
        return self._driver.wait()

    def close(self) -> None:
        """End what is left."""
        if not self.has_ended():
            family = descendants(self._driver.pid)
            self._driver.kill()
            end(family)

    def _start(self, *arguments: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "cluster.cli", *arguments]
        return subprocess.Popen(command, stdout=self.output, stderr=subprocess.STDOUT, text=True)


def measure(num_kills: int, steps: int, chance: random.Random) -> list[Row]:
    """Run undisturbed and disturbed, and compare."""
    overrides = [
        *DISTURBED,
        f"run.steps={steps}",
        "checkpoint.every_steps=5",
    ]
    size = f"embedded pair, {steps} steps, {num_kills} kills"
    with chaos_run(overrides) as undisturbed:
        quiet = outcome(undisturbed, overrides)
    with chaos_run(overrides) as disturbed:
        for kind in shares(num_kills, chance):
            if not disturbed.wait_for_step():
                break
            time.sleep(chance.uniform(0, PAUSE_SECONDS))
            disturbed.disturb(kind, chance)
            print(f"after step {disturbed.last_step()}: {kind}", flush=True)
        shaken = outcome(disturbed, overrides)
        killed = disturbed.killed
    difference = abs(quiet.accuracy - shaken.accuracy)
    return [
        *(row(f"chaos: {kind} killed", size, float(count), "kills") for kind, count in sorted(killed.items())),
        at_least(row("chaos: kills", size, float(killed.total()), "kills"), num_kills),
        at_least(row("chaos: steps completed", size, float(shaken.steps), "steps"), steps),
        at_least(row("chaos: prompts consumed exactly once", size, float(shaken.prompts), "prompts"), quiet.prompts),
        row("chaos: accuracy, undisturbed", size, quiet.accuracy, "ratio"),
        row("chaos: accuracy, disturbed", size, shaken.accuracy, "ratio"),
        at_most(row("chaos: difference in accuracy", size, difference, "ratio"), noise(quiet)),
        row("chaos: seconds, undisturbed", size, quiet.seconds, "s"),
        row("chaos: seconds, disturbed", size, shaken.seconds, "s"),
    ]


@dataclass(frozen=True)
class Outcome:
    """What is left of a run."""

    steps: int
    prompts: int  # consumed exactly once and in order, as the audited ledger says
    accuracy: float
    num_held_out: int
    seconds: float


def noise(found: Outcome) -> float:
    """Return by how much two accuracies may differ by chance: each is a mean over prompts that are right or wrong."""
    return STANDARD_DEVIATIONS * math.sqrt(2 * found.accuracy * (1 - found.accuracy) / found.num_held_out)


def last_record(run: Path) -> dict[str, float]:
    """Return the figures of the last step so far, none before the first; a line that is being written is left out."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    return next((json.loads(line) for line in reversed(lines) if line.endswith("}")), {})


def audited_prompts(run: Path, overrides: Sequence[str]) -> int:
    """Return how many prompts the ledger of a run of the embedded pair shows to be consumed exactly once and in order.

    Raises:
        PreceptorError: the ledger is not that of a run that learned from everything once.
    """
    config = embedded_config(overrides)
    return audit(read_ledger(RunDirectory(run).ledger), config, load_inputs(config).train)


def outcome(run: ChaosRun, overrides: Sequence[str]) -> Outcome:
    """Wait for the run's end and audit its ledger.

    Raises:
        PreceptorError: the ledger is not that of a run that learned from everything once.
    """
    code = run.finish()
    if code != 0:
        raise SystemExit(f"chaos: the run ended with exit code {code}")
    last = last_record(run.run)
    return Outcome(
        steps=int(last["step"]),
        prompts=audited_prompts(run.run, overrides),
        accuracy=float(last["held_out/accuracy"]),
        num_held_out=len(load_inputs(embedded_config(overrides)).held_out_ids),
        seconds=time.perf_counter() - run.started,
    )


@contextmanager
def chaos_run(overrides: Sequence[str]) -> Iterator[ChaosRun]:
    """Run in a folder of its own, which is removed afterwards; the driver's words go to stderr at the end."""
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile("w+") as output:
        run = ChaosRun(Path(directory), output, overrides)
        try:
            yield run
        finally:
            run.close()
            output.seek(0)
            sys.stderr.write(output.read())


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-chaos.json")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    rows = measure(options.kills, options.steps, random.Random(options.seed))
    print_rows(rows)
    command = f"python -m benchmarks.cases.chaos --kills {options.kills} --steps {options.steps} --seed {options.seed}"
    write_rows(options.output, command, rows)
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


if __name__ == "__main__":
    sys.exit(main())
