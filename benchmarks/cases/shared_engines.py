"""`python -m benchmarks.cases.shared_engines`: what a self-teacher in the rollout pool's engines costs.

The run file of OPCD on the embedded pair, strictly on-policy and with a live teacher, that scores in an engine of its
own or in the rollout pool's (`backend = "rollout"`). Runs take turns; the first steps of each are left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.report import RESULTS, Row, at_most, print_rows, row, write_rows

COMMAND = "python -m benchmarks.cases.shared_engines"
BAR = 1.10  # seconds per step in the rollout pool's engines, of those with an engine of its own
RUN_FILE = "examples/self_distillation/opcd.toml"
STEPS, WARM_UP_STEPS = 28, 4
ALWAYS = ("teachers.self.refresh=live", "evaluation.every_steps=0", "ray.dashboard=false", f"run.steps={STEPS}")
ARMS = {"an engine of its own": (), "the rollout pool's engines": ("teachers.self.backend=rollout",)}
OWN, SHARED = ARMS

Measured = dict[str, float]


def main() -> int:
    """Run both in turns, and write and print their medians; exit code 1 when the bar is missed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-shared-engines.json")
    options, overrides = parser.parse_known_args()
    found: dict[str, list[Measured]] = {arm: [] for arm in ARMS}
    for _ in range(options.rounds):
        for arm, own in ARMS.items():
            found[arm].append(run([*ALWAYS, *own, *overrides]))
            print(arm, json.dumps(found[arm][-1]), flush=True)
    rows = rows_of(found)
    print_rows(rows)
    write_rows(options.output, " ".join([COMMAND, *overrides]), rows)
    return 0 if all(one["met"] for one in rows if "met" in one) else 1


def run(overrides: Sequence[str]) -> Measured:
    """Train, and return seconds per step and the held-out accuracy at the end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "cluster.cli", "train", RUN_FILE, f"run.directory={folder}", "run.name=run"]
        subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][WARM_UP_STEPS:]
    return {
        "seconds": statistics.median(step["step/seconds"] for step in steps),
        "tokens": statistics.mean(step["completion_tokens"] for step in steps),
        "accuracy": steps[-1]["held_out/accuracy"],
    }


def rows_of(found: Mapping[str, Sequence[Measured]]) -> list[Row]:
    """Return medians over rounds, and the median of the rounds' ratios."""
    rows = []
    for arm, rounds in found.items():
        size = f"OPCD on the embedded pair, live, strict, {STEPS - WARM_UP_STEPS} steps, {len(rounds)} rounds"
        for name, unit in (("seconds", "s/step"), ("tokens", "tokens/step"), ("accuracy", "ratio")):
            rows.append(row(f"{arm}: {name}", size, statistics.median(one[name] for one in rounds), unit))
    pairs = zip(found[SHARED], found[OWN], strict=True)
    ratio = statistics.median(shared["seconds"] / own["seconds"] for shared, own in pairs)
    rows.append(at_most(row(f"{SHARED}, of {OWN}", "seconds per step", ratio, "ratio"), BAR))
    return rows


if __name__ == "__main__":
    sys.exit(main())
