"""`python -m benchmarks.cases.head_loss`: what those who use a cluster hear when its head is lost during their runs.

A Ray cluster of hosts (harness/hosts.py) with two runs: one was submitted and is followed, the other's driver is on
a node that is not the head. The head loses its network and is switched off, and each must say so in one sentence. Then
somebody tries to submit to it, and to train on it: an address that does not answer, not even to refuse. At last the
second run is resumed on a local cluster, and its ledger audited.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.cases.chaos import audited_prompts, last_record
from benchmarks.harness.hosts import Rack, isolated
from benchmarks.harness.ray_cluster import GCS_PORT, HEAD, Door, cluster_of_hosts, preceptor, submit, wait_until
from benchmarks.harness.report import RESULTS, Row, at_least, at_most, exactly, print_rows, row, write_rows

SIZE = "embedded pair, 3 hosts"
NODES = ("node-1", "node-2")
STEPS_BEFORE, STEPS_AFTER = 6, 4
PROMPTS = 16  # per step
START_SECONDS = 300.0
PATIENCE_SECONDS = 120.0  # of this program, with those who ought to say something
BAR_SECONDS = 60.0  # after which Ray ends a driver without a word
RUN = (
    f"prompts.prompts_per_step={PROMPTS}",
    "evaluation.num_prompts=8",
    "evaluation.teacher_too=false",
    "checkpoint.every_steps=2",
    "checkpoint.export=false",
)


@dataclass(frozen=True)
class Heard:
    """What somebody said of a head that is lost."""

    who: str
    seconds: float
    exit_code: int
    said: Sequence[str]  # lines of Preceptor's own, and whatever else is not the run's output

    def rows(self) -> list[Row]:
        """Return how long it took, and whether it was one sentence."""
        sentences = float(len(self.said)) if self.exit_code == 1 else 0.0
        return [
            at_most(row(f"head lost: {self.who}, seconds", SIZE, self.seconds, "s"), BAR_SECONDS),
            exactly(row(f"head lost: {self.who}, sentences", SIZE, sentences, "lines"), 1),
        ]


@dataclass(frozen=True)
class Listener:
    """A program that is about to hear of it."""

    who: str
    process: "subprocess.Popen[Any]"
    output: Path
    known: int  # characters that it had written before

    def listen(self, since: float) -> Heard:
        """Wait until it has ended and return what it said."""
        code = self.process.wait(PATIENCE_SECONDS)
        said = [line for line in self.output.read_text()[self.known :].splitlines() if not line.startswith("step ")]
        print(f"{self.who}: {said}", flush=True)
        return Heard(self.who, time.monotonic() - since, code, said)


def measure(folder: Path, door: Door, hosts: Rack) -> list[Row]:
    """Start both runs, lose the head, listen, and resume."""
    address = f"{hosts.hosts[HEAD].address}:{GCS_PORT}"
    followed, driven = folder / "followed.txt", folder / "driven.txt"
    with followed.open("w") as first, driven.open("w") as second:
        follower = submit(door, settings(folder, "followed"), first)
        command = [sys.executable, "-m", "cluster.cli", "demo", *settings(folder, "driven")]
        driver = hosts.hosts[NODES[0]].start(command, {**door.environment(), "RAY_ADDRESS": address}, second)
        for name in ("followed", "driven"):
            await_beginning(folder / name)
        hosts.hosts[HEAD].switch_off()
        off = time.monotonic()
        print(f"the head is off after step {last_record(folder / 'driven')['step']}", flush=True)
        listeners = [
            Listener("who follows", follower, followed, followed.stat().st_size),
            Listener("a driver on another host", driver, driven, driven.stat().st_size),
        ]
        heard = [listener.listen(off) for listener in listeners]
    heard += [
        refused(folder, door, "submit", "--address", door.dashboard),
        refused(folder, door, "train", f"ray.address='{address}'"),
    ]
    return [*(found for each in heard for found in each.rows()), *resumed(folder, door)]


def settings(folder: Path, name: str) -> list[str]:
    """Return the overrides of a run."""
    return [f"run.directory={folder}", f"run.name={name}", "run.steps=100000", *RUN]


def await_beginning(run: Path) -> None:
    """Wait until a run has done a few steps."""
    wait_until(lambda: last_record(run).get("step", 0) >= STEPS_BEFORE, START_SECONDS, f"{run.name} has begun")


def refused(folder: Path, door: Door, command: str, *where: str) -> Heard:
    """Let somebody turn to the head that is gone."""
    output, began = folder / f"{command}.txt", time.monotonic()
    with output.open("w") as file:
        process = preceptor(door, command, "demo.toml", *settings(folder, command), *where, output=file)
        return Listener(f"preceptor {command}", process, output, 0).listen(began)


def resumed(folder: Path, door: Door) -> list[Row]:
    """Go on with the run whose driver was ended, without the cluster."""
    run = folder / "driven"
    steps = int(last_record(run)["step"]) + STEPS_AFTER
    process = preceptor(door, "train", "--resume", str(run), f"run.steps={steps}", output=sys.stderr)
    code = process.wait()
    prompts = audited_prompts(run, [*RUN, f"run.steps={steps}"]) if code == 0 else 0
    return [
        at_least(
            row("head lost: prompts consumed exactly once after --resume", SIZE, prompts, "prompts"), steps * PROMPTS
        )
    ]


def main() -> int:
    """Measure and write the rows; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.head_loss", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-head-loss.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the program runs in its namespaces
    options = parser.parse_args()
    if not options.inside:
        isolated("benchmarks.cases.head_loss", ["--output", str(options.output.resolve()), "--inside"])
    with cluster_of_hosts(NODES) as (door, hosts):
        rows = measure(hosts.folder, door, hosts)
    print_rows(rows)
    write_rows(options.output, "python -m benchmarks.cases.head_loss", rows)
    return 0 if all(found["met"] for found in rows if "met" in found) else 1


if __name__ == "__main__":
    sys.exit(main())
