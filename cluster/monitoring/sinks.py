"""Shows a run's metrics at the terminal, as a live view or as plain lines."""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live

from cluster.contracts.files import Record
from cluster.monitoring.run_view import RunView

REFRESHES_PER_SECOND = 1.0  # each takes some milliseconds, in which the loop may wait for Python

# What a plain line shows of a record: label, name of the metric, format.
_COLUMNS = [
    ("step", "step", "{:.0f}"),
    ("KL/token", "train/kl", "{:.4f}"),
    ("", "rollout/reward", "{:.3f}"),  # the run says what it is called
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


class TerminalView(Protocol):
    """Shows a run to the user at the terminal."""

    def say(self, line: str) -> None:
        """Show one line that stays."""

    def warn(self, line: str) -> None:
        """Show an alarm, which also stays in sight until the next one."""

    def show(self, record: Record) -> None:
        """Show one step's metrics."""

    def finish(self) -> None:
        """Leave the steps as they stand; what is said from now on comes after them."""


class PlainView:
    """Prints one line per step, for logs and pipes."""

    def __init__(self, reward_name: str = "accuracy") -> None:
        self._reward_name = reward_name

    def say(self, line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def warn(self, line: str) -> None:
        self.say(line)

    def show(self, record: Record) -> None:
        self.say("  ".join(f"{label} {text}" for label, text in _cells(record, self._reward_name)))

    def finish(self) -> None:
        """Do nothing: lines stand in the order in which they were said."""


class LiveView:
    """Keeps how the run stands at the foot of the terminal.

    A thread of its own draws it, so that the loop waits for no terminal; what is said scrolls by above.
    """

    def __init__(self, console: Console, name: str, total_steps: int) -> None:
        self._console = console
        self._view = RunView(name, total_steps, ascii_only=console.options.ascii_only)
        self._live = Live(self._view, console=console, refresh_per_second=REFRESHES_PER_SECOND)

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def warn(self, line: str) -> None:
        self._view.alarm = line
        self.say(line)

    def show(self, record: Record) -> None:
        self._view.add(record)
        if not self._live.is_started:
            self._live.start()

    def finish(self) -> None:
        self._view.state = "all steps done" if self._view.is_over else "stopped"
        self._live.stop()


@contextmanager
def terminal_view(name: str, total_steps: int, reward_name: str = "accuracy") -> Iterator[TerminalView]:
    """Give a live view on a terminal, plain lines elsewhere; `reward_name` is what lines call the mean reward."""
    console = Console()
    if not (console.is_interactive and sys.stdout.isatty()):
        yield PlainView(reward_name)
        return
    view = LiveView(console, name, total_steps)
    try:
        yield view
    finally:
        view.finish()


def _cells(record: Record, reward_name: str) -> list[tuple[str, str]]:
    return [
        (label or reward_name, form.format(record[name]))
        for label, name, form in _COLUMNS
        if name in record and math.isfinite(record[name])
    ]
