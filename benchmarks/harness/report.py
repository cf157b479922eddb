"""The form that every benchmark's figures take."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
Row = dict[str, Any]  # name, size, value, unit, and where there is a bar: bar, met


def row(name: str, size: str, value: float, unit: str) -> Row:
    """Return one line of a table."""
    return {"name": name, "size": size, "value": round(value, 6), "unit": unit}


def at_least(found: Row, bar: float) -> Row:
    """Add the bar that a row's value has to reach.

    Example:
        >>> at_least(row("speed-up", "2 workers", 1.9, "ratio"), 2)["met"]
        False
    """
    return {**found, "bar": f">= {bar:g}", "met": found["value"] >= bar}


def at_most(found: Row, bar: float) -> Row:
    """Add the bar that a row's value may not exceed."""
    return {**found, "bar": f"<= {bar:g}", "met": found["value"] <= bar}


def exactly(found: Row, bar: float) -> Row:
    """Add the only value that a row may have."""
    return {**found, "bar": f"== {bar:g}", "met": found["value"] == bar}


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table."""
    name, size = (max((len(found[column]) for found in rows), default=0) for column in ("name", "size"))
    for found in rows:
        bar = f"   bar {found['bar']}: {'met' if found['met'] else 'MISSED'}" if "bar" in found else ""
        print(f"{found['name']:<{name}} {found['size']:<{size}} {found['value']:>12,.4g} {found['unit']}{bar}")


def write_rows(output: Path, command: str, rows: Sequence[Row]) -> None:
    """Write a part's figures, and what they belong to."""
    output.parent.mkdir(parents=True, exist_ok=True)
    described = {"command": command, **describe_machine()}
    output.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")


def describe_machine() -> Row:
    """Say what the figures belong to."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{package: version_of(package) for package in ("torch", "ray", "deepspeed")},
        "load_average": os.getloadavg()[0],
    }


def version_of(package: str) -> str:
    """Return a package's version, also where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
