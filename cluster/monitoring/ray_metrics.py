"""Sets a run's metrics in Ray, from which Prometheus reads them on every node."""

import math
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.monitoring.metric_table import EVERY_STEP, POOL, Metric, all_metrics
from cluster.monitoring.observers import Ending, StepSample

# A completion's end lies anywhere between a word and a long chain of thought, so the buckets double.
LENGTH_BOUNDARIES = [float(1 << power) for power in range(2, 18)]  # tokens


class RayMetrics:
    """Sets every metric of the table once per step, under the tag `run`."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics = [(metric, _make(metric)) for metric in all_metrics()]

    def on_step(self, sample: StepSample) -> None:
        """Set the step's values; a metric that the step lacks keeps its last value."""
        for metric, ray_metric in self._metrics:
            if isinstance(ray_metric, Histogram):
                for length in sample.completion_lengths:
                    ray_metric.observe(length, {"run": self._run})
                continue
            for tags, value in self._values(metric, sample):
                if isinstance(ray_metric, Gauge):
                    ray_metric.set(value, tags)
                elif value > 0:  # a counter takes nothing else
                    ray_metric.inc(value, tags)

    def close(self, ending: Ending) -> None:
        """Do nothing: Ray drops the metrics of a driver that has gone."""

    def _values(self, metric: Metric, sample: StepSample) -> list[tuple[dict[str, str], float]]:
        values: Mapping[str, float] = {EVERY_STEP: 1.0, **sample.record}
        tagged = [({"run": self._run}, metric.source)]
        if metric.is_per_pool:
            pools = [pool.name for pool in sample.pools]
            tagged = [({"run": self._run, "pool": pool}, metric.source.replace(POOL, pool)) for pool in pools]
        return [(tags, values[source]) for tags, source in tagged if math.isfinite(values.get(source, math.nan))]


def _make(metric: Metric) -> Counter | Gauge | Histogram:
    tags = ("run", "pool") if metric.is_per_pool else ("run",)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, boundaries=LENGTH_BOUNDARIES, tag_keys=tags)
    return (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.description, tag_keys=tags)
