"""Draws a run on a few lines that a person can read at a glance, from the metrics of its steps alone."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.contracts.files import Record

BAR_CELLS = 20
SPARK_CELLS = 40
RECENT_STEPS = 20  # whose mean length tells the time that is left
MAX_POINTS = 2000  # of a curve
CURVES = (  # of which the latter are shown where there are held-out prompts
    ("KL per token", "train/kl", "{:.4f}"),
    ("held-out KL", "held_out/kl", "{:.4f}"),
    ("held-out accuracy", "held_out/accuracy", "{:.3f}"),
)
BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*#@"


@dataclass
class Curve:
    """Keeps the values of one metric by step: the latest, and where they become many those of every so many steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    _every: int = 1

    def add(self, step: int, value: float) -> None:
        self.drop_from(step)
        if len(self.steps) > 1 and self.steps[-1] % self._every:
            self.drop_from(self.steps[-1])
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > MAX_POINTS:
            self._every *= 2
            kept = [place for place, step in enumerate(self.steps) if place == 0 or step % self._every == 0]
            self.steps, self.values = [self.steps[place] for place in kept], [self.values[place] for place in kept]

    def drop_from(self, step: int) -> None:
        """Forget steps that are done again."""
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()


@dataclass
class RunView:
    """Takes in the steps of a run and draws how it stands."""

    name: str
    total_steps: int
    ascii_only: bool = False  # the terminal has no block characters
    clock: Callable[[], float] = time.monotonic
    record: Record = field(default_factory=dict)  # of the latest step
    alarm: str = ""  # the last one
    state: str = ""  # "": the run goes on
    # The terminal is drawn from another thread, and from a signal handler that interrupts `add`.
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for _, name, _ in CURVES})
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))  # of each step
    _seen_at: float | None = None  # when the latest step was; None: before this view began

    def add(self, record: Record, is_new: bool = True) -> None:
        """Take in a step; one that is not new was done before this view began."""
        with self._lock:
            self._add(record, is_new)

    def _add(self, record: Record, is_new: bool) -> None:
        step, now = int(record["step"]), self.clock()
        if is_new and self._seen_at is not None:
            self._seconds.append(now - self._seen_at)  # evaluations and checkpoints included
        elif not is_new:
            self._seconds.append(record.get("step/seconds", math.nan))
        self._seen_at = now if is_new else None
        self.record = record
        for name, curve in self._curves.items():
            curve.drop_from(step)
            if math.isfinite(value := record.get(name, math.nan)):
                curve.add(step, value)

    @property
    def is_over(self) -> bool:
        return self.record.get("step") == self.total_steps

    def seconds_left(self) -> float | None:
        """Return what the remaining steps will take if they are as long as the latest ones; None: no step says."""
        known = [seconds for seconds in self._seconds if math.isfinite(seconds)]
        if not known or not self.record:
            return None
        since = 0.0 if self._seen_at is None else self.clock() - self._seen_at
        return max(0.0, (self.total_steps - self.record["step"]) * sum(known) / len(known) - since)

    def __rich__(self) -> Group:
        """Draw the run; nothing before its first step."""
        with self._lock:
            if not self.record:
                return Group()
            lines: list[RenderableType] = [self._headline(), self._pools(), self._curves_drawn()]
            if self.alarm:
                lines.append(Text(f"last {self.alarm}", style="bold", overflow="ellipsis", no_wrap=True))
            return Group(*lines)

    def _headline(self) -> Text:
        step = int(self.record["step"])
        parts = [f"step {step} of {self.total_steps}"]
        if (rate := self.record.get("step/tokens_per_second")) is not None:
            parts.append(f"{rate:,.0f} completion tokens/s")
        if self.state:
            parts.append(self.state)
        elif (left := self.seconds_left()) is not None:
            parts.append(f"{duration(left)} left")
        if not self.state and self._seen_at is not None and (since := self.clock() - self._seen_at) >= 1:
            parts.append(f"{duration(since)} since the last step")
        bar = self._bar(step / self.total_steps)
        return Text(f"{self.name}  {bar}  {', '.join(parts)}", overflow="ellipsis", no_wrap=True)

    def _pools(self) -> Table:
        table = _grid(columns=4)
        for name in pools_of(self.record):
            metrics = {key: self.record.get(f"pool/{name}/{key}", math.nan) for key in POOL_METRICS}
            busy, rate, restarts = metrics["busy_share"], metrics["tokens_per_second"], metrics["restarts"]
            notes = [f"{metrics['serving']:.0f}/{metrics['wanted']:.0f} serve"]
            notes += [f"{rate:,.0f} tokens/s"] if math.isfinite(rate) else []
            notes += [f"{restarts:.0f} restarted"] if restarts > 0 else []
            table.add_row(Text(name), self._bar(busy), Text(f"{busy:.0%} busy", justify="right"), ", ".join(notes))
        return table

    def _curves_drawn(self) -> Table:
        table = _grid(columns=3)
        for label, name, form in CURVES:
            curve = self._curves[name]
            if values := curve.values:
                change = form.format(values[0]) + (f" -> {form.format(values[-1])}" if len(values) > 1 else "")
                table.add_row(label, sparkline(curve, SPARK_CELLS, self.ascii_only), change)
        return table

    def _bar(self, share: float) -> str:
        full = round(min(1.0, max(0.0, share)) * BAR_CELLS) if math.isfinite(share) else 0
        filled, empty = ("#", ".") if self.ascii_only else ("█", "░")
        return filled * full + empty * (BAR_CELLS - full)


POOL_METRICS = ("busy_share", "serving", "wanted", "restarts", "tokens_per_second")


def _grid(columns: int) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(no_wrap=True)  # else a narrow terminal would make two lines of one
    return table


def pools_of(record: Record) -> list[str]:
    """Return the pools that a step's metrics speak of, in their order."""
    return [name.split("/")[1] for name in record if name.startswith("pool/") and name.endswith("/busy_share")]


def sparkline(curve: Curve, cells: int, ascii_only: bool = False) -> str:
    """Draw a curve as blocks, from its lowest cell to its highest; each is the mean of its part of the steps.

    Example:
        >>> sparkline(Curve([1, 2, 3, 4], [0.0, 1.0, 2.0, 7.0]), cells=8), sparkline(Curve([1, 2], [1.0, 1.0]), cells=8)
        ('▁▂▃█', '▁▁')
        >>> sparkline(Curve([1, 2, 3, 4], [0.0, 2.0, 6.0, 8.0]), cells=2)
        '▁█'
    """
    blocks = ASCII_BLOCKS if ascii_only else BLOCKS
    count, first = min(cells, len(curve.steps)), curve.steps[0]
    parts: dict[int, list[float]] = {}  # a cell without a step is left out
    for step, value in zip(curve.steps, curve.values, strict=True):
        parts.setdefault((step - first) * count // (curve.steps[-1] - first + 1), []).append(value)
    means = [sum(part) / len(part) for part in parts.values()]
    low, height = min(means), max(means) - min(means)
    return "".join(blocks[min(7, int(8 * (mean - low) / height))] if height else blocks[0] for mean in means)


def duration(seconds: float) -> str:
    """Say a duration.

    Example:
        >>> [duration(seconds) for seconds in (7.4, 65, 3600, 100_000)]
        ['7 s', '1 min 5 s', '1 h 0 min', '1 d 3 h']
    """
    whole = int(seconds)
    for unit, smaller, length, part in (("d", "h", 86_400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    return f"{whole} s"
