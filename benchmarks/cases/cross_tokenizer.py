"""`python -m benchmarks.cases.cross_tokenizer`: how far a student learns from a teacher with another tokenizer.

The embedded task, by the whole pipeline. The student writes byte-level BPE tokens. One arm's teacher has its tokenizer;
the other's, trained from the same weights, has one in the manner of SentencePiece that spells sums above 40 in two
tokens (`examples/countdown/other_tokenizers.py`). Both compare the student's 16 most likely tokens, renormalised.

A run is appended to a JSON-lines file as soon as it ends, and a second call does only what is missing there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, Row, at_least, print_rows, row, write_rows
from cluster.demo import EMBEDDED, embedded_config

COMMAND = "python -m benchmarks.cases.cross_tokenizer"
BAR = 0.5  # the rise of held-out accuracy, in that of the same tokenizer
ARMS = {"same": ("teacher", "same"), "aligned": ("other_teacher", "aligned")}
RUN = (
    "objective.preset=cross-tokenizer",
    "run.name=run",
    "run.steps=30",
    "evaluation.every_steps=0",
    "evaluation.num_prompts=512",
    "evaluation.teacher_too=false",
    "learner.num_workers=1",
    "learner.zero_stage=0",
    "checkpoint.export=false",
    "ray.dashboard=false",
)
MEANS = (
    "teacher/coverage",
    "teacher/teacher_shared_mass",
    "teacher/student_shared_mass",
    "train/teacher_candidate_mass",
)


def main() -> int:
    """Do the runs that are missing, then write and print what the file holds; exit code 1 when the bar is missed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--models", type=Path, help="what other_tokenizers wrote; without it, it is made first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-cross-tokenizer.json")
    options, overrides = parser.parse_known_args()
    log = options.output.with_suffix(".jsonl")
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or make_models(Path(folder))
        for seed in options.seeds:
            for arm in options.arms:
                if not any((run["arm"], run["seed"]) == (arm, seed) for run in read_outcomes(log)):
                    outcome = run_arm(arm, seed, models, overrides)
                    print(json.dumps(outcome), flush=True)
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(outcome) + "\n")
    rows = rows_of(read_outcomes(log))
    print_rows(rows)
    write_rows(options.output, COMMAND, rows)
    return 0 if all(made["met"] for made in rows if "met" in made) else 1


def make_models(folder: Path) -> Path:
    """Train the other teacher, in a process of its own, which keeps this one's memory small."""
    made = folder / "models"
    command = [sys.executable, "-m", "examples.countdown.other_tokenizers", "--out", str(made)]
    subprocess.run([*command, "--embedded", str(EMBEDDED)], check=True)
    return made


def read_outcomes(log: Path) -> list[dict[str, Any]]:
    """Return the runs that were done."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def overrides_of(arm: str, seed: int, models: Path, directory: Path) -> list[str]:
    """Return what an arm changes in the embedded run."""
    teacher, tokenizer = ARMS[arm]
    return [
        f"student.model={models / 'student'}",
        f"teachers.countdown.model={models / teacher}",
        f"teachers.countdown.tokenizer={tokenizer}",
        f"run.directory={directory}",
        f"run.seed={seed}",
        *RUN,
    ]


def run_arm(arm: str, seed: int, models: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Train in a folder of its own; held-out accuracy is that before and after."""
    from cluster.commands import start_training
    from cluster.nodes.preloaded_python import preloading

    with tempfile.TemporaryDirectory() as directory:
        config = embedded_config([*overrides_of(arm, seed, models, Path(directory)), *overrides])
        started = time.perf_counter()
        with preloading(config):
            summary = start_training(config)
        lines = (Path(directory) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ledger = (Path(directory) / "run/ledger.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return {
        "arm": arm,
        "seed": seed,
        "before": summary.first_accuracy,
        "after": summary.last_accuracy,
        "steps": len(steps),
        "seconds": time.perf_counter() - started,
        "checkpoint": json.loads(ledger[0])["teachers"],
        **{name: statistics.mean(step[name] for step in steps) for name in MEANS if name in steps[0]},
    }


def rows_of(outcomes: Sequence[dict[str, Any]]) -> list[Row]:
    """Return each arm's accuracy, the mean of its seeds, and what the bar asks of them."""
    rows, rises = [], {}
    for arm in ARMS:
        runs = [outcome for outcome in outcomes if outcome["arm"] == arm]
        if not runs:
            continue
        size = f"embedded task, {runs[0]['steps']} steps, {len(runs)} seeds"
        before, after = (statistics.mean(run[name] for run in runs) for name in ("before", "after"))
        rises[arm] = after - before
        rows.append(row(f"{arm}: held-out accuracy before", size, before, "share"))
        rows.append(row(f"{arm}: held-out accuracy after", size, after, "share"))
        rows += [
            row(f"{arm}: {name}", size, statistics.mean(run[name] for run in runs), "share")
            for name in MEANS
            if name in runs[0]
        ]
    if rises.keys() == ARMS.keys():
        size = "rise of held-out accuracy"
        rows.append(at_least(row("aligned, of same", size, rises["aligned"] / rises["same"], "ratio"), BAR))
    return rows


if __name__ == "__main__":
    sys.exit(main())
