"""Train the calculator's teacher and student from nothing, and write them with their prompts.

python -m examples.calculator.train_models --out runs/calculator
"""

from __future__ import annotations

import argparse
import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch

from examples.calculator.task import build_tokenizer, draw_batch, draw_problem
from examples.countdown.pretraining import Phase, Shape, new_model, save, train

TEACHER = Shape(hidden_size=128, num_layers=3, intermediate_size=384)
STUDENT = Shape(hidden_size=96, num_layers=3, intermediate_size=256)
GUESSES = 0.55  # of the student's answers where a call is due: a number that it makes up
BATCH_SIZE = 48
NUM_TRAIN_PROMPTS, NUM_HELD_OUT_PROMPTS = 6_000, 500


def main() -> None:
    """Write prompts, teacher and student."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/calculator"))
    parser.add_argument("--only", choices=["prompts", "teacher", "student"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only in (None, "prompts"):
        write_prompts(arguments.out)
    careful = partial(draw_batch, size=BATCH_SIZE, guesses=0.0)
    careless = partial(draw_batch, size=BATCH_SIZE, guesses=GUESSES)
    parts = {"teacher": (TEACHER, [Phase(400, careful)])}
    parts["student"] = (STUDENT, [Phase(240, careful), Phase(60, careless, matrix_lr=0.005, other_lr=1e-3)])
    for name, (shape, phases) in parts.items():
        if arguments.only in (None, name):
            write_model(arguments.out / name, shape, phases, arguments.seed)


def write_model(directory: Path, shape: Shape, phases: list[Phase], seed: int) -> None:
    """Train one model through its phases, and write it with the tokenizer."""
    model = new_model(shape, seed)
    for index, phase in enumerate(phases):
        train(model, phase, np.random.default_rng([seed, shape.hidden_size, index]))
    save(model, directory)
    build_tokenizer().save_pretrained(directory)


def write_prompts(directory: Path) -> None:
    """Write the training and held-out prompts; no problem occurs twice."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", NUM_TRAIN_PROMPTS), ("held_out", NUM_HELD_OUT_PROMPTS)):
        rng = np.random.default_rng([0, count])
        problems = dict.fromkeys(draw_problem(rng, held_out=name == "held_out") for _ in range(2 * count))
        with (directory / f"{name}.jsonl").open("w") as file:
            for problem in list(problems)[:count]:
                file.write(json.dumps({"prompt": problem.text, "answer": str(problem.answer)}) + "\n")


if __name__ == "__main__":
    main()
