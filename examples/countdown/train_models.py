"""Train the embedded teacher and student from nothing and write everything the demo ships.

python -m examples.countdown.train_models --out cluster/embedded
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from examples.countdown import student, teacher
from examples.countdown.pretraining import Phase, Shape, accuracy, new_model, save, train
from examples.countdown.task import Problems, answer_patterns, draw_problems, prompt_texts

NUM_TRAIN_PROMPTS = 20_000
NUM_HELD_OUT_PROMPTS = 1_000
NUM_CHECKED_PROBLEMS = 256  # after each phase
NUM_SPARE_PROMPTS = 500  # drawn beyond the wanted number, since repeated problems are dropped

logger = logging.getLogger(__name__)


def main() -> None:
    """Train what was asked for and write it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("cluster/embedded"))
    parser.add_argument("--only", choices=["prompts", "teacher", "student"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts: dict[str, Callable[[], None]] = {
        "prompts": lambda: write_prompts(arguments.out, arguments.seed),
        "teacher": lambda: write_model(arguments.out / "teacher", teacher.SHAPE, teacher.phases(), arguments.seed),
        "student": lambda: write_model(arguments.out / "student", student.SHAPE, student.phases(), arguments.seed),
    }
    for name, write in parts.items():
        if arguments.only in (None, name):
            write()


def write_model(directory: Path, shape: Shape, phases: list[Phase], seed: int) -> None:
    """Train one model through its phases; it is saved after each, and the next one starts from the saved weights."""
    problems = draw_problems(np.random.default_rng(seed), NUM_CHECKED_PROBLEMS)
    model = new_model(shape, seed)
    for index, phase in enumerate(phases):
        train(model, phase, np.random.default_rng([seed, shape.hidden_size, index]))
        sampled, greedy = accuracy(model, problems), accuracy(model, problems, do_sample=False)
        logger.info("phase %d, (solved, at first try): sampled %s, greedy %s", index, sampled, greedy)
        save(model, directory)


def write_prompts(directory: Path, seed: int) -> None:
    """Write the training and held-out prompt files; no problem occurs twice, in any order of its list."""
    directory.mkdir(parents=True, exist_ok=True)
    counts = {"train": NUM_TRAIN_PROMPTS, "held_out": NUM_HELD_OUT_PROMPTS}
    for name, count in counts.items():
        rng = np.random.default_rng([seed, count])
        problems = draw_problems(rng, count + NUM_SPARE_PROMPTS, held_out=name == "held_out")
        with (directory / f"{name}.jsonl").open("w") as file:
            file.writelines(_prompt_lines(_without_repeats(problems).take(slice(count))))


def _without_repeats(problems: Problems) -> Problems:
    keys = np.hstack([problems.targets[:, None], np.sort(problems.numbers, axis=1)])
    _, first_rows = np.unique(keys, axis=0, return_index=True)
    return problems.take(np.sort(first_rows))


def _prompt_lines(problems: Problems) -> list[str]:
    pairs = zip(prompt_texts(problems), answer_patterns(problems), strict=True)
    return [json.dumps({"prompt": prompt, "answer": answer, "domain": "countdown"}) + "\n" for prompt, answer in pairs]


if __name__ == "__main__":
    main()
