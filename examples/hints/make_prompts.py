"""Writes Countdown problems that must be solved in one try, with a hint for each: prompts for `one_try.toml`.

    python -m examples.hints.make_prompts --out runs/hints

The lists are longer than those that the embedded student was trained on, and the run file leaves no tokens for a second
try. The hint is a list of the usual length with nothing in it but the right pair.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.countdown.task import LIST_LENGTH, Problems, answer_patterns, draw_problems, prompt_texts

SIZES = {"train": 384, "held_out": 256}
NUMBERS = 10  # in a problem's list


def rows_of(problems: Problems) -> Iterator[dict[str, str]]:
    """Yield a row of the prompts' file for each problem."""
    pairs = np.take_along_axis(problems.numbers, problems.pair, axis=1)
    for prompt, answer, pair in zip(prompt_texts(problems), answer_patterns(problems), pairs, strict=True):
        hint = " ".join(map(str, np.tile(pair, LIST_LENGTH // 2)))
        yield {"prompt": prompt, "answer": answer, "hint": hint}


def write_prompts(folder: Path, seed: int = 0) -> None:
    """Write train.jsonl and held_out.jsonl; the latter has problems that no model of the pair was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([7, seed])
    for name, count in SIZES.items():
        problems = draw_problems(rng, count, NUMBERS, held_out=name == "held_out")
        lines = (json.dumps(row) + "\n" for row in rows_of(problems))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.hints.make_prompts", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/hints"))
    write_prompts(parser.parse_args().out)


if __name__ == "__main__":
    main()
