"""`python -m benchmarks.same_run RUN RUN`: compares what two runs learned, by their directories.

It prints the largest relative difference of every metric that differs, times, shares and queues aside, and whether
the ledgers are the same bytes, the same trajectories in another order, or different. Exit code 1: something differs
by more than `--tolerance`, or the ledgers hold different trajectories.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.config.run_directory import RunDirectory

# Parts of the names of metrics that say how fast a run was, and not what it learned.
TIMING = ("seconds", "per_second", "share", "queued", "switches", "pool/", "balance/")

Record = Mapping[str, Any]


def main() -> int:
    """Compare two run directories and print how they differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_run", description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative difference of a metric (0: the same)")
    options = parser.parse_args()
    first, second = (RunDirectory.open(path) for path in options.runs)
    metrics = differences(records(first.metrics), records(second.metrics))
    for name, difference in metrics.items():
        print(f"{name:45s} {difference:.2e}")
    print(f"largest relative difference: {max(metrics.values(), default=0.0):.2e}")
    same = compare_ledgers(first.ledger, second.ledger)
    print(f"ledgers: {same}")
    return int(same == "different" or max(metrics.values(), default=0.0) > options.tolerance)


def records(path: Path) -> list[Record]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def differences(first: Sequence[Record], second: Sequence[Record]) -> dict[str, float]:
    """Return the largest relative difference of every metric that differs in some step.

    Example:
        >>> differences([{"step": 1, "kl": 2.0, "step/seconds": 1.0}], [{"step": 1, "kl": 2.5, "step/seconds": 3.0}])
        {'kl': 0.25}
    """
    if len(first) != len(second):
        return {"number of steps": abs(len(first) - len(second)) / max(1, len(first))}
    names = {name for record in (*first, *second) for name in record if not any(part in name for part in TIMING)}
    largest = {
        name: max(_difference(one.get(name), other.get(name)) for one, other in zip(first, second, strict=True))
        for name in sorted(names)
    }
    return {name: difference for name, difference in largest.items() if difference > 0}


def compare_ledgers(first: Path, second: Path) -> str:
    """Return whether two ledgers hold the same trajectories, step by step."""
    if first.read_bytes() == second.read_bytes():
        return "byte-identical"
    both = ([_unordered(record) for record in records(path)] for path in (first, second))
    return "equal up to order" if next(both) == next(both) else "different"


def _difference(one: Any, other: Any) -> float:
    if one == other or (_is_nan(one) and _is_nan(other)):
        return 0.0
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return math.inf
    return abs(one - other) / max(abs(one), 1e-9)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _unordered(value: Any) -> Any:
    """Return a JSON value in which the order of a list's items is always the same."""
    if isinstance(value, dict):
        return {key: _unordered(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted((_unordered(item) for item in value), key=json.dumps)
    return value


if __name__ == "__main__":
    sys.exit(main())
