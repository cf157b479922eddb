"""`python -m benchmarks.cases.staleness`: what generation that runs ahead of learning costs in accuracy, per objective.

The embedded pair is trained with every bound on staleness under three objectives. Forward KL is taken over the
teacher's top 16 tokens and one bucket for the rest, as in the demo. The two reverse KLs are policy gradients that
differ only in whose log-probability the signal log teacher - log student divides by: that of the student now, or that
of the rollout, frozen when the token was written. Both have the unclipped ratio of the two. The question and the
findings to compare with are those of AsyncOPD (arXiv 2606.24143): forward KL flat, recomputed above frozen.

A run is appended to a JSON-lines file as soon as it ends, and a second call does only what is missing there.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.harness.report import RESULTS, Row, describe_machine, print_rows, row
from cluster.commands import start_training
from cluster.config.run_config import Config
from cluster.demo import embedded_config

BOUNDS = (0, 1, 2, 4)
OBJECTIVES = {
    "forward": ("objective.preset=tail-topk", "objective.terms.main.divergence=forward_kl"),
    "recomputed": ("objective.preset=thinking-machines", "objective.terms.main.student=current"),
    "frozen": ("objective.preset=thinking-machines", "objective.terms.main.student=rollout"),
}
TITLES = {
    "forward": "forward KL",
    "recomputed": "reverse KL, recomputed",
    "frozen": "reverse KL, frozen",
}
BARE = ("evaluation.every_steps=0", "evaluation.teacher_too=false", "checkpoint.export=false", "ray.dashboard=false")


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    objective: str  # a key of OBJECTIVES
    max_staleness: int
    seed: int
    steps: int
    learning_rate: float

    def config(self, *overrides: str) -> Config:
        """Return the demo's run file with what this run varies, and further overrides."""
        varied = (
            f"rollout.max_staleness={self.max_staleness}",
            f"run.seed={self.seed}",
            f"run.steps={self.steps}",
            f"learner.learning_rate={self.learning_rate}",
        )
        return embedded_config([*OBJECTIVES[self.objective], *varied, *BARE, *overrides])


@dataclass(frozen=True)
class Outcome:
    """What a run came to; held-out figures are of the student before and after."""

    cell: Cell
    first_accuracy: float
    last_accuracy: float
    first_kl: float  # KL(student || teacher) per token, from samples
    last_kl: float
    mean_staleness: float  # measured, of all trajectories; the bound need not be reached
    largest_staleness: float
    num_completion_tokens: int
    seconds: float  # in all, start of the engines included


def main() -> None:
    """Do the runs that are missing, then write and print the table of all that the file holds."""
    options = parse_options()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    log = options.output.with_suffix(".jsonl")
    shared = options.steps, options.learning_rate
    wanted = [Cell(objective, bound, seed, *shared) for seed in options.seeds for objective, bound in options.cells]
    for cell in missing(wanted, read_outcomes(log)):
        print(f"{cell.objective}, max_staleness {cell.max_staleness}, seed {cell.seed}", flush=True)
        append_outcome(log, run_cell(cell))
    outcomes = [found for found in read_outcomes(log) if (found.cell.steps, found.cell.learning_rate) == shared]
    rows = study_rows(outcomes)
    print_rows(rows)
    described = {"command": "python -m benchmarks.cases.staleness", **describe_machine()}
    result = {"machine": described, "titles": TITLES, "rows": rows, "runs": [asdict(found) for found in outcomes]}
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {options.output}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cases.staleness", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=embedded_config().run.steps, help="default: the demo's")
    parser.add_argument("--learning-rate", type=float, default=embedded_config().learner.learning_rate)
    parser.add_argument(
        "--cells",
        type=parse_cell,
        nargs="+",
        default=list(product(OBJECTIVES, BOUNDS)),
        help="OBJECTIVE:MAX_STALENESS, for example frozen:4; default: all",
    )
    output = RESULTS / f"{date.today():%Y-%m-%d}-staleness.json"
    parser.add_argument("--output", type=Path, default=output, help="the runs are kept beside it, as .jsonl")
    return parser.parse_args()


def parse_cell(text: str) -> tuple[str, int]:
    """Read OBJECTIVE:MAX_STALENESS.

    Example:
        >>> parse_cell("frozen:4")
        ('frozen', 4)
    """
    objective, _, bound = text.partition(":")
    if objective not in OBJECTIVES or not bound.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(OBJECTIVES)}, a colon and a number")
    return objective, int(bound)


def missing(wanted: Iterable[Cell], outcomes: Iterable[Outcome]) -> list[Cell]:
    """Return the runs that no outcome is of, in their order."""
    done = {found.cell for found in outcomes}
    return [cell for cell in wanted if cell not in done]


def run_cell(cell: Cell) -> Outcome:
    """Train in a folder of its own, which goes when the figures are read."""
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        found = start_training(cell.config(f"run.directory={directory}", "run.name=cell"))
        seconds = time.perf_counter() - started
        steps = [json.loads(line) for line in (Path(directory) / "cell/metrics.jsonl").read_text().splitlines()]
    return Outcome(
        cell=cell,
        first_accuracy=_measured(found.first_accuracy),
        last_accuracy=_measured(found.last_accuracy),
        first_kl=_measured(found.first_kl),
        last_kl=_measured(found.last_kl),
        mean_staleness=statistics.mean(step["staleness/mean"] for step in steps),  # steps have equally many rows
        largest_staleness=max(step["staleness/max"] for step in steps),
        num_completion_tokens=sum(step["completion_tokens"] for step in steps),
        seconds=seconds,
    )


def read_outcomes(log: Path) -> list[Outcome]:
    """Return the runs that ended so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    found = [json.loads(line) for line in lines]
    return [Outcome(**{**fields, "cell": Cell(**fields["cell"])}) for fields in found]


def append_outcome(log: Path, outcome: Outcome) -> None:
    """Add a run to the file."""
    with log.open("a") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def study_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return the means over seeds of every cell, and each objective's trend."""
    rows = []
    for objective, bound in product(OBJECTIVES, sorted({one.cell.max_staleness for one in outcomes})):
        found = [one for one in outcomes if (one.cell.objective, one.cell.max_staleness) == (objective, bound)]
        rows += cell_rows(f"staleness: {TITLES[objective]}", f"max_staleness {bound}", found)
    for objective in OBJECTIVES:
        rows += trend_rows(TITLES[objective], [one for one in outcomes if one.cell.objective == objective])
    return rows


def cell_rows(name: str, size: str, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return one cell's means over its seeds; nothing where it was not run."""
    if not outcomes:
        return []
    size = f"{size}, {outcomes[0].cell.steps} steps, {len(outcomes)} seeds"

    def mean(figure: str, values: Iterable[float], unit: str) -> Row:
        return row(f"{name}: {figure}", size, statistics.mean(values), unit)

    return [
        mean("held-out accuracy before", (one.first_accuracy for one in outcomes), "ratio"),
        mean("held-out accuracy after", (one.last_accuracy for one in outcomes), "ratio"),
        mean("held-out KL before", (one.first_kl for one in outcomes), "nats/token"),
        mean("held-out KL after", (one.last_kl for one in outcomes), "nats/token"),
        mean("measured staleness", (one.mean_staleness for one in outcomes), "steps"),
        row(f"{name}: largest staleness", size, max(one.largest_staleness for one in outcomes), "steps"),
    ]


def trend_rows(title: str, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return how accuracy and KL move each time staleness + 1 doubles (AsyncOPD's slope, on measured staleness)."""
    doublings = [math.log2(1 + one.mean_staleness) for one in outcomes]
    if len({round(value, 2) for value in doublings}) < 2:
        return []
    size = f"{len(outcomes)} runs"
    points = np.polyfit(doublings, [100 * one.last_accuracy for one in outcomes], 1)[0]
    kl = np.polyfit(doublings, [one.last_kl for one in outcomes], 1)[0]
    return [
        row(f"staleness: {title}: accuracy per doubling", size, float(points), "points"),
        row(f"staleness: {title}: KL per doubling", size, float(kl), "nats/token"),
    ]


def _measured(value: float | None) -> float:
    assert value is not None, "the embedded pair has held-out prompts with answers, and samples at temperature 1"
    return value


if __name__ == "__main__":
    main()
