"""Where a run's figures go: files of JSON lines, and the terminal as a live table or as plain lines."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.contracts.errors import CheckpointError

Record = Mapping[str, float]  # one step's figures by name

# What the terminal shows of a record: label, name of the figure, format.
_COLUMNS = [
    ("step", "step", "{:.0f}"),
    ("KL/token", "train/kl", "{:.4f}"),
    ("accuracy", "rollout/reward", "{:.3f}"),
    ("held-out", "held_out/accuracy", "{:.3f}"),
    ("held-out KL", "held_out/kl", "{:.4f}"),
    ("length", "rollout/completion_length", "{:.1f}"),
    ("generate tok/s", "generate/tokens_per_second", "{:,.0f}"),
    ("score tok/s", "score/tokens_per_second", "{:,.0f}"),
    ("learn tok/s", "learn/tokens_per_second", "{:,.0f}"),
    ("generate s", "generate/seconds", "{:.2f}"),
    ("score s", "score/seconds", "{:.2f}"),
    ("learn s", "learn/seconds", "{:.2f}"),
    ("sync s", "sync/seconds", "{:.2f}"),
]
_ROWS_SHOWN = 12


class RecordsFile:
    """A file of one JSON object per line, each with the step that it belongs to, in order.

    A crash can cut the last line short; such a line does not count. Other damage is a CheckpointError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        """Return the lines that were written completely."""
        return [line for line, _ in self._parsed()]

    def read(self) -> list[dict[str, Any]]:
        """Return what was written so far, without the figures that were not finite."""
        return [{name: value for name, value in found.items() if value is not None} for _, found in self._parsed()]

    def drop_from(self, step: int) -> None:
        """Forget `step` and what followed: a resumed run does those steps again."""
        self.keep(lambda record: record["step"] < step)

    def keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> None:
        """Forget all records but those that are to be kept, and a last line that was cut short."""
        if not self.path.exists():
            return
        shortened = self.path.with_name(self.path.name + ".partial")
        with shortened.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line, record in self._parsed() if is_kept(record))
            file.flush()
            os.fsync(file.fileno())
        shortened.replace(self.path)

    def write(self, record: Mapping[str, Any]) -> str:
        """Append one object and return its line; a figure that is not finite becomes null."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = json.dumps(finite)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return line

    def sync(self) -> None:
        """Bring what was written to disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _parsed(self) -> list[tuple[str, dict[str, Any]]]:
        *complete, _torn = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        found = []
        for number, line in enumerate(complete, start=1):
            try:
                found.append((line.decode(), _record(line)))
            except ValueError as error:
                if number == len(complete):  # a crash of the whole machine can leave zeros in the place of a line
                    break
                raise CheckpointError(f"{self.path}:{number}: not a record of a step; restore the line") from error
        return found


def _record(line: bytes) -> dict[str, Any]:
    found = json.loads(line)
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise ValueError("no object with a step")
    return found


class TerminalView(Protocol):
    """What the person at the terminal sees."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def show(self, record: Record) -> None:
        """Show one step's figures."""

    def finish(self) -> None:
        """Leave the steps as they stand; what is said from now on comes after them."""


class PlainView:
    """One line per step, for logs and pipes."""

    def say(self, line: str) -> None:
        """Print the line at once."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def show(self, record: Record) -> None:
        """Print the step's figures as `label value` pairs."""
        self.say("  ".join(f"{label} {text}" for label, text in _cells(record)))

    def finish(self) -> None:
        """Do nothing: lines stand in the order in which they were said."""


class LiveView:
    """A table of the last steps that is redrawn in place."""

    def __init__(self, console: Console, live: Live, total_steps: int) -> None:
        self._console = console
        self._live = live
        self._total_steps = total_steps
        self._records: list[Record] = []

    def say(self, line: str) -> None:
        """Print above the table."""
        self._console.print(line, highlight=False, markup=False)

    def show(self, record: Record) -> None:
        """Add a row."""
        self._records = [*self._records, record][-_ROWS_SHOWN:]
        self._live.update(self._table(), refresh=True)

    def finish(self) -> None:
        """Stop redrawing the table."""
        self._live.stop()

    def _table(self) -> Table:
        table = Table(title=f"step {self._records[-1]['step']:.0f} of {self._total_steps}", expand=True)
        shown = {label for record in self._records for label, _ in _cells(record)}
        labels = [label for label, _, _ in _COLUMNS if label in shown]
        for label in labels:
            table.add_column(label, justify="right")
        for record in self._records:
            cells = dict(_cells(record))
            table.add_row(*(cells.get(label, "") for label in labels))
        return table


@contextmanager
def terminal_view(total_steps: int) -> Iterator[TerminalView]:
    """Give a live table on a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield PlainView()
        return
    with Live(console=console, auto_refresh=False) as live:
        yield LiveView(console, live, total_steps)


def _cells(record: Record) -> list[tuple[str, str]]:
    return [
        (label, form.format(record[name]))
        for label, name, form in _COLUMNS
        if name in record and math.isfinite(record[name])
    ]
