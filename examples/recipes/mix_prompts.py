"""Write prompts of several sources into one file, each with the name of the teacher that it goes to.

    python -m examples.recipes.mix_prompts math=openai/gsm8k/main general=databricks/databricks-dolly-15k

A source is what `prompts.train` takes: a file, a folder, or a data set of the Hugging Face hub.
"""

import argparse
import json
import sys
from pathlib import Path

from cluster.contracts.errors import PreceptorError, PromptError
from rollout_workers.prompt_sources import guess_columns, read_rows, value_at


def main() -> None:
    """Write the file and say how many prompts each teacher has."""
    parser = argparse.ArgumentParser(description="Write prompts of several sources into one file.")
    parser.add_argument("sources", nargs="+", metavar="TEACHER=SOURCE", help="NAME of [teachers.NAME], and its prompts")
    parser.add_argument("--output", type=Path, default=Path("data/mixed.jsonl"))
    options = parser.parse_args()
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        lines = {name: to_lines(name, source) for name, _, source in (text.partition("=") for text in options.sources)}
    except PreceptorError as error:
        sys.exit(str(error))
    output.write_text("".join(line for of_teacher in lines.values() for line in of_teacher), encoding="utf-8")
    counts = ", ".join(f"{name} {len(of_teacher)}" for name, of_teacher in lines.items())
    print(f"{output} written: {counts}")


def to_lines(teacher: str, source: str) -> list[str]:
    """Return the source's rows as lines of a prompt file."""
    lines = []
    for where, row in read_rows(source):
        if isinstance(row, PromptError):
            raise PromptError(f"{where}: {row}")
        columns = guess_columns(row)
        if "prompt" not in columns:
            raise PromptError(f"{where}: no column looks like a prompt; it has {', '.join(row)}")
        kept = {field: value_at(row, column) for field, column in columns.items()}
        lines.append(json.dumps({**kept, "domain": teacher, "teacher": teacher}, ensure_ascii=False) + "\n")
    return lines


if __name__ == "__main__":
    main()
