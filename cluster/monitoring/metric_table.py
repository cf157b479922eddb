"""Reads the table of a run's metrics, from which Ray's metrics, the Grafana dashboard and docs/metrics.md are made."""

import tomllib
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

POOL = "{pool}"  # in a source: stands for each pool's name, which becomes the tag `pool`
# Sources that are no name in metrics.jsonl.
COMPLETION_LENGTHS = "completion tokens of every trajectory"
EVERY_STEP = "every step"


class Metric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One metric of Ray; those of pools have the tag `pool` besides `run`."""

    name: str
    source: str  # its name in metrics.jsonl, or one of the two above
    description: str
    kind: Literal["gauge", "counter", "histogram"] = "gauge"

    @property
    def is_per_pool(self) -> bool:
        return POOL in self.source


class Panel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Metrics of one unit in one panel of the dashboard."""

    row: str
    title: str
    unit: str  # as Grafana calls it
    metrics: tuple[Metric, ...]


@cache
def panels() -> tuple[Panel, ...]:
    """Return the table, panel by panel."""
    text = (Path(__file__).parent / "metrics.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text)["panels"], tuple[Panel, ...])


def all_metrics() -> list[Metric]:
    return [metric for panel in panels() for metric in panel.metrics]
