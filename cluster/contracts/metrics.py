"""Metric values that know how they merge, across micro-batches, workers and ranks.

Example:
    >>> report(merge([{"reward": Mean(3.0, 4)}, {"reward": Mean(1.0, 4)}]))
    {'reward': 0.5}
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True)
class Sum:
    """Adds up: tokens, bytes, seconds of work."""

    total: float

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True)
class Mean:
    """A weighted mean, kept as its total and weight so that parts of unequal size merge exactly."""

    total: float
    weight: float

    def merge(self, other: Self) -> Self:
        return type(self)(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """Return total / weight; NaN when nothing was weighed."""
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class Max:
    """The largest: staleness, gradient norm, peak memory."""

    largest: float

    def merge(self, other: Self) -> Self:
        return type(self)(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        return self.largest


QUANTILE_GROWTH = 1.02  # bucket width: a quantile is right to 1 % of its value
QUANTILE_SMALLEST = 1e-9  # magnitudes below this count as 0


@dataclass(frozen=True)
class Quantile:
    """A quantile over merged parts, from counts in buckets of geometric width (DDSketch, Masson et al. 2019)."""

    fraction: float
    counts: Mapping[int, int] = field(default_factory=dict)  # signed bucket -> values in it

    @classmethod
    def of(cls, fraction: float, values: Iterable[float]) -> Self:
        return cls(fraction, Counter(map(_bucket, values)))

    def merge(self, other: Self) -> Self:
        return type(self)(self.fraction, Counter(self.counts) + Counter(other.counts))

    @property
    def value(self) -> float:
        """Return the quantile; NaN when there were no values."""
        remaining = self.fraction * (sum(self.counts.values()) - 1)
        for bucket in sorted(self.counts):
            remaining -= self.counts[bucket]
            if remaining < 0:
                return _middle(bucket)
        return math.nan


Metric = Sum | Mean | Max | Quantile
Metrics = Mapping[str, Metric]


def merge(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Merge metrics of the same names; a name that only some parts have counts for those."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric  # type: ignore[arg-type]
    return merged


def report(metrics: Metrics) -> dict[str, float]:
    """Return each metric's single value."""
    return {name: metric.value for name, metric in metrics.items()}


def _bucket(value: float) -> int:
    if abs(value) < QUANTILE_SMALLEST:
        return 0
    magnitude = 1 + math.floor(math.log(abs(value) / QUANTILE_SMALLEST) / math.log(QUANTILE_GROWTH))
    return magnitude if value > 0 else -magnitude


def _middle(bucket: int) -> float:
    if bucket == 0:
        return 0.0
    return math.copysign(QUANTILE_SMALLEST * QUANTILE_GROWTH ** (abs(bucket) - 0.5), bucket)
