"""What a figure of a run is, and a panel of them."""

from dataclasses import dataclass
from typing import Literal

POOL = "{pool}"  # in a source: stands for each pool's name, which becomes the tag `pool`


@dataclass(frozen=True)
class Figure:
    """One metric; those of sources with `{pool}` have the tag `pool` besides `run`."""

    metric: str
    source: str  # its name in metrics.jsonl, or what is counted
    says: str
    kind: Literal["gauge", "counter", "histogram"] = "gauge"

    @property
    def is_of_pools(self) -> bool:
        """Return whether every pool has one."""
        return POOL in self.source


@dataclass(frozen=True)
class Panel:
    """Figures of one unit that are looked at together."""

    row: str
    title: str
    unit: str  # as Grafana calls it
    figures: tuple[Figure, ...]
