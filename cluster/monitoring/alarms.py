"""Raises alarms when the metrics of a run say that training goes wrong.

An alarm's state follows from the records alone. A resumed run passes it the recorded steps again and goes on as if it
had never stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.config.alarms import AlarmConfig
from cluster.config.stages import HorizonConfig
from cluster.contracts.files import Record

FIRST_STEPS = 10  # whose mean is a metric's first level
RECENT_STEPS = 20  # whose median is its recent level
MIN_RECENT_STEPS = 5
SHORTER = 0.75
SHORTEST_TOKENS = 16


@dataclass(frozen=True)
class Raised:
    """Describes an alarm that goes off."""

    name: str
    step: int
    value: float
    limit: float
    config: AlarmConfig

    def __str__(self) -> str:
        """Say it in one sentence.

        Example:
            >>> rule = AlarmConfig("rollout/truncated_ratio", above=0.5)
            >>> str(Raised("truncation", 7, 0.61, 0.5, rule))
            'alarm truncation at step 7: rollout/truncated_ratio is 0.61, above 0.5, for 3 steps in a row'
        """
        config = self.config
        side = "above" if config.above is not None else "below"
        level = f" ({config.above or config.below:g} x its {config.relative_to} level)" if config.relative_to else ""
        lasting = f", for {config.steps} steps in a row" if config.steps > 1 else ""
        return (
            f"alarm {self.name} at step {self.step}: {config.metric} is {self.value:.4g}, {side} "
            f"{self.limit:.4g}{level}{lasting}"
        )


@dataclass
class Alarms:
    """Checks all alarms of a run.

    Example:
        >>> alarms = Alarms({"long": AlarmConfig("length", above=8.0, steps=2)})
        >>> [len(alarms.check({"step": step, "length": 9.0})) for step in (1, 2, 3)]
        [0, 1, 0]
    """

    configs: Mapping[str, AlarmConfig]
    _watches: dict[str, "_Watch"] = field(init=False)

    def __post_init__(self) -> None:
        self._watches = {name: _Watch(config) for name, config in self.configs.items() if config.action != "off"}

    def check(self, record: Record) -> list[Raised]:
        """Take in one step's metrics and return the alarms that go off; one goes off again once it was silent."""
        raised = []
        for name, watch in self._watches.items():
            value = record.get(watch.config.metric)
            if value is not None and (limit := watch.take(value)) is not None:
                raised.append(Raised(name, int(record["step"]), value, limit, watch.config))
        return raised


@dataclass
class _Watch:
    config: AlarmConfig
    _first: list[float] = field(default_factory=list)
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    _steps_in_a_row: int = 0

    def take(self, value: float) -> float | None:
        """Return the limit when the rule has held for just as many steps as it takes."""
        limit = self._limit()
        if len(self._first) < FIRST_STEPS:
            self._first.append(value)
        self._recent.append(value)
        above = self.config.above is not None
        holds = limit is not None and (value > limit if above else value < limit)
        self._steps_in_a_row = self._steps_in_a_row + 1 if holds else 0
        return limit if self._steps_in_a_row == self.config.steps else None

    def _limit(self) -> float | None:
        """Return the limit for the next value; None while there is no level that it is relative to."""
        limit = self.config.above if self.config.above is not None else self.config.below
        assert limit is not None, "the configuration has one"
        if self.config.relative_to is None:
            return limit
        if self.config.relative_to == "first":
            return limit * statistics.mean(self._first) if len(self._first) == FIRST_STEPS else None
        return limit * statistics.median(self._recent) if len(self._recent) >= MIN_RECENT_STEPS else None


@dataclass
class LengthCap:
    """Bounds the completions of each step: alarms lower the bound, and a horizon raises it while that pays.

    A step's requests may go out while `max_staleness` earlier steps are still learned from. A lower cap therefore takes
    effect that much later, in a run that was interrupted as in one that was not.

    Example:
        >>> cap = LengthCap(max_completion_tokens=512, max_staleness=1)
        >>> cap.lower(after_step=10)
        >>> [cap.at(step) for step in (10, 11, 12)]
        [512, 384, 384]
    """

    max_completion_tokens: int
    max_staleness: int
    horizon: HorizonConfig | None = None  # None: the bound is never raised
    _changes: list[tuple[int, int]] = field(default_factory=list)  # from which step on, tokens

    def lower(self, after_step: int) -> None:
        """Lower the cap by a quarter, once `after_step` steps are done."""
        shortest = min(SHORTEST_TOKENS, self.max_completion_tokens)
        lowered = max(shortest, int(SHORTER * self._latest))
        self._changes.append((after_step + self.max_staleness, lowered))

    def observe(self, record: Record) -> None:
        """Raise the cap if a step, by its metrics, has cut few completions off whose ends still teach.

        Example:
            >>> cap = LengthCap(512, max_staleness=0, horizon=HorizonConfig(start=64))
            >>> metrics = {"rollout/truncated_ratio": 0.1, "teacher/log_ratio": 0.4, "teacher/cut_tail_log_ratio": 0.3}
            >>> cap.observe({"step": 8, **metrics})
            >>> cap.at(7), cap.at(8)
            (64, 96)
        """
        if self.horizon is None or self._latest >= self.max_completion_tokens:
            return
        truncated, whole = record.get("rollout/truncated_ratio", 0.0), record.get("teacher/log_ratio", 0.0)
        tail = record.get("teacher/cut_tail_log_ratio", 0.0)
        if 0 < truncated <= self.horizon.max_truncated and tail >= self.horizon.min_tail * whole:
            raised = min(self.max_completion_tokens, math.ceil(self.horizon.factor * self._latest))
            self._changes.append((int(record["step"]) + self.max_staleness, raised))

    def at(self, step: int) -> int:
        return next((tokens for first, tokens in reversed(self._changes) if first <= step), self._first)

    @property
    def _first(self) -> int:
        return self.max_completion_tokens if self.horizon is None else self.horizon.start

    @property
    def _latest(self) -> int:
        return self._changes[-1][1] if self._changes else self._first
