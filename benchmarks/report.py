"""The form that every benchmark's figures take."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]  # name, size, value, unit, and where there is a bar: bar, met


def row(name: str, size: str, value: float, unit: str) -> Row:
    """Return one line of a table."""
    return {"name": name, "size": size, "value": round(value, 6), "unit": unit}


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table."""
    for found in rows:
        bar = f"   bar {found['bar']}: {'met' if found['met'] else 'MISSED'}" if "bar" in found else ""
        print(f"{found['name']:<42} {found['size']:<30} {found['value']:>12,.4g} {found['unit']}{bar}")


def describe_machine() -> Row:
    """Say what the figures belong to."""
    return {
        "cpus": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "ray": version("ray"),
        "deepspeed": version("deepspeed"),
        "load_average": os.getloadavg()[0],
    }
