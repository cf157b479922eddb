"""`python -m benchmarks.cases.stop_classes`: how long completions become where student and teacher end by other ids.

Through the whole pipeline, the embedded student learns from its own copy, in which `<eos>` and another special token
have changed places: the teacher ends where the student does, by the other id. Both ids end completions in every arm, so
nothing but the objective can make them longer. The arms are the default, in which both ids count as one token, and
`rollout.stop_class = []`, in which each counts by itself: the student unlearns its own end before it learns the other.

A run is appended to a JSON-lines file as soon as it ends, and a second call does only what is missing there.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.harness.report import RESULTS, Row, at_most, print_rows, row, write_rows
from cluster.config.run_config import Config

COMMAND = "python -m benchmarks.cases.stop_classes"
OTHER_END = "<reserved_0>"
ARMS: dict[str, tuple[str, ...]] = {"one class": (), "each by itself": ("rollout.stop_class=[]",)}
SETTINGS = (
    "run.name=run",
    "evaluation.every_steps=0",
    'teachers.countdown.accept_differences=["eos"]',
    "rollout.max_completion_tokens=96",
    "learner.lr_schedule=constant",
    "logging.tensorboard=false",
    "ray.dashboard=false",
)
MAX_GROWTH = 1.1  # of the mean length, in that of the first step


def main() -> int:
    """Run both arms, print and write what became of the lengths; exit code 1 when those of the class grow."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=RESULTS / f"{date.today():%Y-%m-%d}-stop-classes.json")
    options, overrides = parser.parse_known_args()
    log = options.output.with_suffix(".jsonl")
    for seed in options.seeds:
        for arm in ARMS:
            if not any((done["arm"], done["seed"]) == (arm, seed) for done in read_outcomes(log)):
                steps = run_arm(arm, seed, options.steps, overrides)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"arm": arm, "seed": seed, "steps": steps}) + "\n")
    rows = [one for done in read_outcomes(log) for one in rows_of(**done)]
    print_rows(rows)
    write_rows(options.output, COMMAND, rows)
    return 0 if all(one["met"] for one in rows if "met" in one) else 1


def read_outcomes(log: Path) -> list[dict[str, Any]]:
    """Return the runs that were done."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def config_of(folder: Path, arm: str, seed: int, num_steps: int, overrides: Sequence[str] = ()) -> Config:
    """Return the demo's run file with the student's copy for a teacher."""
    from cluster.demo import EMBEDDED, embedded_config

    write_teacher(EMBEDDED / "student", folder / "teacher")
    places = [f"teachers.countdown.model={folder / 'teacher'}", f"run.directory={folder}"]
    return embedded_config([*SETTINGS, *places, f"run.seed={seed}", f"run.steps={num_steps}", *ARMS[arm], *overrides])


def run_arm(arm: str, seed: int, num_steps: int, overrides: Sequence[str]) -> list[tuple[float, float]]:
    """Train, and return mean length and share of truncated completions of each step."""
    from cluster.commands import start_training

    with tempfile.TemporaryDirectory() as directory:
        start_training(config_of(Path(directory), arm, seed, num_steps, overrides))
        lines = (Path(directory) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return [(step["rollout/completion_length"], step["rollout/truncated_ratio"]) for step in steps]


def rows_of(arm: str, seed: int, steps: Sequence[tuple[float, float]]) -> list[Row]:
    """Return first and last lengths, and what the bar asks of the class."""
    size = f"embedded student, {len(steps)} steps, seed {seed}"
    (first, _), (last, truncated) = steps[0], steps[-1]
    growth = row(f"{arm}: last mean length, of the first", size, last / first, "ratio")
    return [
        row(f"{arm}: mean length at first", size, first, "tokens"),
        row(f"{arm}: mean length at last", size, last, "tokens"),
        row(f"{arm}: cut off at the cap at last", size, truncated, "ratio"),
        at_most(growth, MAX_GROWTH) if arm == "one class" else growth,
    ]


def write_teacher(student: Path, folder: Path) -> None:
    """Write the student's copy that ends its turns by another token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(student)
    model = AutoModelForCausalLM.from_pretrained(student)
    ids = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(OTHER_END)
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[list(ids)] = rows[list(reversed(ids))].clone()
    tokenizer.eos_token = OTHER_END
    model.generation_config.eos_token_id = ids[1]
    model.config.eos_token_id = ids[1]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
