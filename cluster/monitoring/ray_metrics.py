"""A run's figures as Ray's metrics, which Prometheus reads from every node and Grafana shows."""

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.monitoring.metric_table import EVERY_STEP, POOL, Figure, figures
from cluster.monitoring.observers import Ending, StepSample

# A completion's end lies anywhere between a word and a long chain of thought, so the buckets double.
LENGTH_BOUNDARIES = [float(1 << power) for power in range(2, 18)]  # tokens


class RayMetrics:
    """Sets every figure of the table once per step, under the tag `run`."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics = {figure.metric: _make(figure) for figure in figures()}

    def on_step(self, seen: StepSample) -> None:
        """Set what the step has; a figure that it lacks keeps its last value."""
        for figure in figures():
            metric = self._metrics[figure.metric]
            if isinstance(metric, Histogram):
                for length in seen.completion_lengths:
                    metric.observe(length, {"run": self._run})
                continue
            for tags, value in self._values(figure, seen):
                if isinstance(metric, Gauge):
                    metric.set(value, tags)
                elif value > 0:  # a counter takes nothing else
                    metric.inc(value, tags)

    def close(self, ending: Ending) -> None:
        """Do nothing: Ray drops the metrics of a driver that has gone."""

    def _values(self, figure: Figure, seen: StepSample) -> list[tuple[dict[str, str], float]]:
        found: Mapping[str, float] = {EVERY_STEP: 1.0, **seen.record}
        if not figure.is_of_pools:
            named = [({"run": self._run}, figure.source)]
        else:
            named = [
                ({"run": self._run, "pool": pool.name}, figure.source.replace(POOL, pool.name)) for pool in seen.pools
            ]
        return [(tags, found[source]) for tags, source in named if math.isfinite(found.get(source, math.nan))]


def _make(figure: Figure) -> Counter | Gauge | Histogram:
    tags = ("run", "pool") if figure.is_of_pools else ("run",)
    if figure.kind == "histogram":
        return Histogram(figure.metric, figure.says, boundaries=LENGTH_BOUNDARIES, tag_keys=tags)
    return (Counter if figure.kind == "counter" else Gauge)(figure.metric, figure.says, tag_keys=tags)
