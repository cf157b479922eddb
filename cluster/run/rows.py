"""Lists and filters the rows that a run learned from: `preceptor rows RUN`."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.contracts.kept_rows import KeptRowFiles
from cluster.contracts.recorded_rows import RecordedRows, Rows

# What is shown of a row, of the columns that are there.
SHOWN = ("step", "trajectory_id", "prompt_id", "teacher", "completion_tokens", "finish_reason", "reward", "log_ratio")


@dataclass(frozen=True)
class RowOptions:
    """Says which rows to show, and how."""

    where: str | None = None  # as `parse_filter` takes it
    columns: str | None = None  # names, with commas between; None: SHOWN
    most: int = 20
    as_json: bool = False  # one object per line
    has_text: bool = False  # with prompt and completion, which takes the student's tokenizer


def print_rows(run: Path, options: RowOptions) -> None:
    """Print rows that a run recorded; of a run that recorded none, those that it kept.

    Raises:
        CheckpointError: there are no rows, or a file is damaged.
        ConfigError: the condition or a column is none.
    """
    directory = RunDirectory.open(run)
    rows = open_rows(directory)
    names = options.columns.split(",") if options.columns else [name for name in SHOWN if name in rows.schema.names]
    texts = ("token_ids", "loss_mask") if options.has_text else ()
    chosen = rows.read(list(dict.fromkeys([*names, *texts])), options.where, options.most).to_pylist()
    if options.has_text:
        _add_texts(directory, chosen)
        names += ["prompt", "completion"]
    shown = [{name: row[name] for name in names} for row in chosen]
    if options.as_json:
        sys.stdout.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
        return
    condition = "" if options.where is None else f", for which {options.where}"
    sys.stdout.writelines(line + "\n" for line in _lines(shown))
    sys.stdout.write(f"{len(chosen)} of {rows.count(options.where):,} rows{condition}; in all {rows.count():,}\n")


def open_rows(directory: RunDirectory) -> Rows:
    """Open the rows that a run recorded, or those that it kept."""
    recorded = [path for paths in RecordedRows(directory.rows).files().values() for path in paths]
    paths = recorded or list(KeptRowFiles(directory.kept_rows).files().values())
    if not paths:
        raise CheckpointError(f"{directory.path}: it has no rows yet; rollout.record = true records all")
    return Rows(paths)


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield a line of names and one per row, columns one below the other; texts have a line of their own."""
    names = [name for name in (rows[0] if rows else ()) if name not in ("prompt", "completion")]
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, line in enumerate(cells):
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        if number and "prompt" in rows[0]:
            yield f"    {rows[number - 1]['prompt']!r} -> {rows[number - 1]['completion']!r}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _add_texts(directory: RunDirectory, rows: Sequence[dict[str, Any]]) -> None:
    """Decode what each row's student read before its first token, and what came from there on."""
    from cluster.models.model_files import load_tokenizer

    student = directory.read_config().student
    tokenizer = load_tokenizer(student.model, student.trust_remote_code)
    for row in rows:
        first = next((place for place, sampled in enumerate(row["loss_mask"]) if sampled), len(row["token_ids"]))
        for name, ids in (("prompt", row["token_ids"][:first]), ("completion", row["token_ids"][first:])):
            row[name] = str(tokenizer.decode(ids))
