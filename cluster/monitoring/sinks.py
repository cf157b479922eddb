"""Shows a run's metrics at the terminal, as a live table or as plain lines."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

from cluster.contracts.files import Record

# What the terminal shows of a record: label, name of the metric, format.
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


class TerminalView(Protocol):
    """Shows a run to the user at the terminal."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def show(self, record: Record) -> None:
        """Show one step's metrics."""

    def finish(self) -> None:
        """Leave the steps as they stand; what is said from now on comes after them."""


class PlainView:
    """Prints one line per step, for logs and pipes."""

    def say(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def show(self, record: Record) -> None:
        self.say("  ".join(f"{label} {text}" for label, text in _cells(record)))

    def finish(self) -> None:
        """Do nothing: lines stand in the order in which they were said."""


class LiveView:
    """Redraws a table of the last steps in place."""

    def __init__(self, console: Console, live: Live, total_steps: int) -> None:
        self._console = console
        self._live = live
        self._total_steps = total_steps
        self._records: list[Record] = []

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def show(self, record: Record) -> None:
        self._records = [*self._records, record][-_ROWS_SHOWN:]
        self._live.update(self._table(), refresh=True)

    def finish(self) -> None:
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
