"""`python -m benchmarks.cases.replay`: recorded rows against live rollouts, on the embedded pair.

*Rate.* Runs in turns, several of each: live without a record, live with one, its replay with recorded signals, and its
replay with the teacher scoring again. Completion tokens per second are of the whole loop, between the ends of the first
and the last counted step; CPU-seconds are those of all processes meanwhile, which other work on the machine changes
little. What recording costs is what its thread computed, and what the loop waited for it.

*Accuracy.* At equal updates, for each seed: live with the default objective and that of Semi-OPD, and replays of what
the initial student wrote for the same prompts: one pass over all of it, and three over a third. The recorded run has a
learning rate that changes nothing. Two more live arms have what saves time: a horizon, and early ends for the learner.

A run is appended to a JSON-lines file as soon as it ends, and a second call does only what is missing there.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.harness.model_pairs import ROOT
from benchmarks.harness.process_trees import cpu_seconds, descendants
from benchmarks.harness.report import RESULTS, Row, at_least, at_most, print_rows, row, write_rows
from cluster.contracts.batches import BatchHandle
from cluster.contracts.files import Record
from cluster.run.hooks import RunContext, StepHook

COMMAND = "python -m benchmarks.cases.replay"
RATE_STEPS, WARM_UP_STEPS = 20, 5
ACCURACY_STEPS, PASSES = 30, 3
LEAST_SPEED_UP, MOST_COST = 3.0, 0.02
EMBEDDED = ROOT / "cluster/embedded"
SETTINGS = (
    "run.name=run",
    f"student.model={EMBEDDED / 'student'}",
    f"prompts.train={EMBEDDED / 'train.jsonl'}",
    f"teachers.countdown.model={EMBEDDED / 'teacher'}",
    "rollout.record=false",
    "learner.learning_rate=2e-3",
    "learner.lr_schedule=linear",
    "learner.warmup_steps=5",
    "evaluation.teacher_too=false",
    "evaluation.num_prompts=500",
    "logging.tensorboard=false",
    "ray.dashboard=false",
)
HELD_OUT = f"prompts.held_out={EMBEDDED / 'held_out.jsonl'}"
STILL = (HELD_OUT, "rollout.record=true", "learner.learning_rate=1e-30")  # the student stays as it is
RECORDED = "live, recorded"
RATE_ARMS: dict[str, tuple[str, ...]] = {
    "live": (),
    RECORDED: ("rollout.record=true",),
    "replayed, recorded signals": ("rollout.replay.run={record}",),
    "replayed, recomputed signals": ("rollout.replay.run={record}", "rollout.replay.signals=recomputed"),
}
SEMI_OPD = ("objective=semi-opd", "objective.support_size=16")
ACCURACY_ARMS: dict[str, tuple[str, ...]] = {
    "live, tail-topk": (HELD_OUT,),
    "initial student's rows, one pass": (HELD_OUT, *SEMI_OPD, "rollout.replay.run={record}"),
    f"initial student's rows, {PASSES} passes over a third": (
        HELD_OUT,
        *SEMI_OPD,
        "rollout.replay.run={record}",
        f"rollout.replay.where=step <= {ACCURACY_STEPS // PASSES}",
    ),
}
FURTHER_ARMS: dict[str, tuple[str, ...]] = {
    "live, semi-opd": (HELD_OUT, *SEMI_OPD),
    "live, horizon from 6 tokens": (HELD_OUT, "rollout.horizon.start=6"),
    "live, ends after 3 tokens below 0.02 nats": (
        HELD_OUT,
        "objective.token_weights.stop_window=3",
        "objective.token_weights.stop_below=0.02",
    ),
}
Outcome = dict[str, Any]


class StepTimes(StepHook):
    """Writes beside the run's metrics when each step ended, and the CPU-seconds of all processes of the run by then."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._path = run.directory.path / "step_times.jsonl"
        self._processes = descendants(os.getpid())

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([time.perf_counter(), sum(cpu_seconds(self._processes).values())]) + "\n")
        return {}


def main() -> int:
    """Do the runs that are missing, print and write what became of them; exit code 1 when a bar is missed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/benchmark-replay", help="of the runs")
    parser.add_argument("--rounds", type=int, default=3, help="of each arm of the rate")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the accuracy")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-replay.json")
    options, overrides = parser.parse_known_args()
    done = Log(options.output.with_suffix(".jsonl"), options.folder, overrides)
    for number in range(options.rounds):
        done.measure("rate", number, RATE_STEPS, RATE_ARMS)
    for seed in options.seeds:
        done.measure("accuracy", seed, ACCURACY_STEPS, ACCURACY_ARMS, STILL)
    for seed in options.seeds:
        done.measure("accuracy", seed, ACCURACY_STEPS, FURTHER_ARMS)
    rows = [*rate_rows(done.outcomes("rate")), *accuracy_rows(done.outcomes("accuracy"))]
    print_rows(rows)
    write_rows(options.output, COMMAND, rows)
    return 0 if all(one["met"] for one in rows if "met" in one) else 1


class Log:
    """Does runs, and keeps what became of them in a file of JSON lines."""

    def __init__(self, path: Path, folder: Path, overrides: Sequence[str]) -> None:
        """Keep outcomes in `path`, and the runs that others replay in `folder`; `overrides` are of all runs."""
        self._path, self._folder, self._overrides = path, folder, overrides

    def outcomes(self, part: str) -> list[Outcome]:
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        return [one for one in map(json.loads, lines) if one["part"] == part]

    def measure(
        self, part: str, number: int, steps: int, arms: dict[str, tuple[str, ...]], recorded: Sequence[str] = ()
    ) -> None:
        """Do the arms of one round or seed that are missing, after the `recorded` run that they replay.

        Without one, the arm RECORDED is what others replay, and is done first.
        """
        done = [one["arm"] for one in self.outcomes(part) if one["number"] == number]
        missing = [arm for arm in arms if arm not in done]
        settings = (f"run.seed={number}", f"run.steps={steps}", *self._overrides)
        record = self._folder / f"{part}-{number}"
        if missing and recorded and not (record / "run/export").exists():
            do_run(record, (*settings, *recorded, "checkpoint.export=true"))
        for arm in sorted(missing, key=lambda arm: arm != RECORDED):
            filled = [text.format(record=record / "run") for text in arms[arm]]
            folder = record if arm == RECORDED else self._folder / f"{part}-{number}-arm"
            outcome = {"part": part, "number": number, "arm": arm, **do_run(folder, (*settings, *filled))}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")


def do_run(folder: Path, overrides: Iterable[str]) -> Outcome:
    """Train, and return what the loop did from one step's end to another's; the folder of an earlier run goes."""
    shutil.rmtree(folder, ignore_errors=True)
    hook = 'run.hooks=["benchmarks.cases.replay:StepTimes"]'
    words = ["train", str(ROOT / "examples/replay/record.toml"), f"run.directory={folder}", hook, *SETTINGS, *overrides]
    subprocess.run([sys.executable, "-m", "cluster.cli", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [json.loads(line) for line in (folder / "run/step_times.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds, cpu = (last - first for first, last in zip(ends[WARM_UP_STEPS - 1], ends[-1], strict=True))
    counted, cost = steps[WARM_UP_STEPS:], ("record/write_seconds", "record/wait_seconds")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": sum(step["completion_tokens"] for step in counted),
        "bytes": sum(step.get("record/bytes", 0.0) for step in counted),
        "record_seconds": sum(step.get(name, 0.0) for step in counted for name in cost),
        "learn_seconds": sum(step["learn/seconds"] for step in counted),
        "left_out": statistics.mean(step.get("train/left_out_ratio", 0.0) for step in counted),
        "length_cap": steps[-1]["rollout/length_cap"],
        "accuracy": steps[-1].get("held_out/accuracy"),
        "loss": steps[-1]["train/loss"],
    }


def rate_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return rates, their ratios to the live run of the same round, and what recording costs."""
    of_arms = {arm: {one["number"]: one for one in outcomes if one["arm"] == arm} for arm in RATE_ARMS}
    rounds = sorted(set.intersection(*(set(of_arm) for of_arm in of_arms.values())))
    if not rounds:
        return []
    size = f"embedded pair, {RATE_STEPS - WARM_UP_STEPS} steps, {len(rounds)} rounds"
    rates = {arm: [done[n]["tokens"] / done[n]["seconds"] for n in rounds] for arm, done in of_arms.items()}
    rows = [row(f"{arm}: tokens/s", size, statistics.median(values), "tokens/s") for arm, values in rates.items()]
    cost = {arm: [1000 * done[n]["cpu_seconds"] / done[n]["tokens"] for n in rounds] for arm, done in of_arms.items()}
    rows += [row(f"{arm}: CPU per 1,000 tokens", size, statistics.median(cost[arm]), "CPU-s") for arm in RATE_ARMS]
    for arm in list(RATE_ARMS)[1:]:
        saved = statistics.median(live / one for one, live in zip(cost[arm], cost["live"], strict=True))
        rows.append(row(f"live / {arm}: CPU per token", size, saved, "ratio"))
        ratio = statistics.median(one / live for one, live in zip(rates[arm], rates["live"], strict=True))
        replayed = row(f"{arm}: of the live rate", size, ratio, "ratio")
        rows.append(at_least(replayed, LEAST_SPEED_UP) if arm == "replayed, recorded signals" else replayed)
    recorded = [of_arms[RECORDED][n] for n in rounds]
    share = statistics.median(one["record_seconds"] / one["seconds"] for one in recorded)
    per_token = sum(one["bytes"] for one in recorded) / sum(one["tokens"] for one in recorded)
    return [
        *rows,
        at_most(row("recording: its thread and the loop's wait, of the time", size, share, "ratio"), MOST_COST),
        row("recording: bytes on disk per completion token", size, per_token, "B"),
    ]


def accuracy_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return each arm's held-out accuracy: mean over seeds, and each seed's."""
    rows = []
    for arm in (*ACCURACY_ARMS, *FURTHER_ARMS):
        of_seeds = {one["number"]: one for one in outcomes if one["arm"] == arm}
        if not of_seeds:
            continue
        values = [of_seeds[seed]["accuracy"] for seed in sorted(of_seeds)]
        listed = ", ".join(f"{value:.3f}" for value in values)
        size = f"embedded pair, {ACCURACY_STEPS} steps, seeds {', '.join(map(str, sorted(of_seeds)))}: {listed}"
        rows.append(row(f"{arm}: held-out accuracy", size, statistics.mean(values), "ratio"))
        medians: list[tuple[str, str, str]] = [
            ("time of the loop", "seconds", "s"),
            ("completion tokens", "tokens", "tokens"),
        ]
        if arm.startswith("live, ends"):
            medians += [("share of tokens left out", "left_out", "ratio"), ("learner's time", "learn_seconds", "s")]
        for what, name, unit in medians:
            rows.append(row(f"{arm}: {what}", size, statistics.median(one[name] for one in of_seeds.values()), unit))
    return rows


if __name__ == "__main__":
    sys.exit(main())
