"""Puts runs side by side, from their directories alone: settings that differ, and what came of them."""

import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.config.run_directory import RunDirectory
from cluster.config.run_file import MAX_RUN_FILE_BYTES
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.contracts.files import RecordsFile, read_text
from cluster.monitoring.run_view import duration
from cluster.monitoring.status_file import Status, read_status

OWN_SETTINGS = ("run.name", "run.directory")  # of which no two runs have the same
RECENT_STEPS = 10  # whose mean is a step metric's last value
SHOWN_CHARACTERS = 48  # of a setting

Value = str | float | None  # None: the run does not say
Records = list[dict[str, Any]]


class Comparison(msgspec.Struct, frozen=True):
    """Holds one value per run, in the order of the runs, for each setting that differs and for each outcome."""

    runs: list[str]
    settings: dict[str, list[Any]]
    outcome: dict[str, list[Value]]


def compare(paths: Sequence[Path]) -> Comparison:
    """Read the runs; raise CheckpointError or ConfigError where a directory holds none, or a damaged file."""
    directories = [RunDirectory.open(path) for path in paths]
    settings = [_settings(directory) for directory in directories]
    names = list(dict.fromkeys(name for of_run in settings for name in of_run))
    columns = {name: [of_run.get(name) for of_run in settings] for name in names if name not in OWN_SETTINGS}
    differing = {name: column for name, column in columns.items() if any(value != column[0] for value in column)}
    runs = [RecordsFile(directory.metrics).read() for directory in directories]
    outcomes = [_outcome(directory, records) for directory, records in zip(directories, runs, strict=True)]
    outcome = {name: [of_run[name] for of_run in outcomes] for name in outcomes[0]}
    outcome |= _at_the_same_step(runs)
    shown = {name: values for name, values in outcome.items() if any(value not in (None, "") for value in values)}
    return Comparison(_labels(paths), differing, shown)


def print_comparison(paths: Sequence[Path], as_json: bool) -> None:
    """Print how runs differ, as JSON or for people."""
    if len(paths) < 2:
        raise ConfigError("preceptor compare takes two run directories or more")
    comparison = compare(paths)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(comparison), indent=2).decode() + "\n")
        return
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width to which lines would be cut
        console = Console(highlight=False, width=40 + (SHOWN_CHARACTERS + 3) * len(paths))
    if not comparison.settings:
        console.print("the same settings")
    for title, rows, show in (
        ("settings that differ", comparison.settings, _setting),
        ("outcome", comparison.outcome, _number),
    ):
        if rows:
            console.print(_table(title, comparison.runs, rows, show))


def _settings(directory: RunDirectory) -> dict[str, Any]:
    """Return each setting by its dotted name, also of a version whose settings this one does not know."""
    text = read_text(directory.config, "run's configuration", ConfigError, MAX_RUN_FILE_BYTES)
    try:
        tree = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{directory.config}: not a run's configuration: {error}") from error
    return {**dict(_flat(tree)), **_prompts(directory)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _prompts(directory: RunDirectory) -> dict[str, Any]:
    """Return which prompts the run began with: files of the same name may hold others."""
    if not directory.prompts.exists():
        return {}
    text = read_text(directory.prompts, "record of the prompts", CheckpointError, MAX_RUN_FILE_BYTES)
    try:
        record = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{directory.prompts}: not a record of prompts: {error}") from error
    return {f"prompts ({name})": record.get(name) for name in ("num_train", "num_held_out", "checksum")}


def _outcome(directory: RunDirectory, records: Records) -> dict[str, Value]:
    status = read_status(directory.status)
    accuracy, kl = _series(records, "held_out/accuracy"), _series(records, "held_out/kl")
    return {
        "state": "unknown" if status is None else status.state,
        "error": "" if status is None else status.error,
        "steps": float(records[-1]["step"]) if records else 0.0,
        "held-out accuracy, last": _last(accuracy),
        "held-out accuracy, best": max(accuracy.values(), default=None),
        "held-out KL, last": _last(kl),
        "held-out KL, best": min(kl.values(), default=None),
        f"KL per token, last {RECENT_STEPS} steps": _middle(statistics.mean, _recent(records, "train/kl")),
        "completion tokens/s, median": _middle(statistics.median, _series(records, "step/tokens_per_second").values()),
        "step seconds, median": _middle(statistics.median, _series(records, "step/seconds").values()),
        "seconds of all steps": _middle(math.fsum, _series(records, "step/seconds").values()),
        "wall seconds since the last start": _wall_seconds(status),
        "completion tokens": _middle(math.fsum, _series(records, "completion_tokens").values()),
        "learner's peak memory, GiB": max(_series(records, "train/peak_memory_gib").values(), default=None),
        "alarms": float(len(RecordsFile(directory.alarms).read())),
    }


def _at_the_same_step(runs: Sequence[Records]) -> dict[str, list[Value]]:
    """Return held-out metrics after the last step that all runs evaluated, where some go on behind it."""
    rows: dict[str, list[Value]] = {}
    for label, name in (("held-out accuracy", "held_out/accuracy"), ("held-out KL", "held_out/kl")):
        series = [_series(records, name) for records in runs]
        common = set.intersection(*(set(values) for values in series))
        if common and any(max(values) != max(common) for values in series):
            rows[f"{label} after step {max(common)}"] = [values[max(common)] for values in series]
    return rows


def _series(records: Records, name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in records if name in record}


def _recent(records: Records, name: str) -> list[float]:
    return list(_series(records[-RECENT_STEPS:], name).values())


def _last(series: Mapping[int, float]) -> float | None:
    return series[max(series)] if series else None


def _middle(summarise: Callable[[Iterable[float]], float], values: Iterable[float]) -> float | None:
    listed = list(values)
    return summarise(listed) if listed else None


def _wall_seconds(status: Status | None) -> float | None:
    return None if status is None else status.changed_at - status.started_at


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the folders' names; whole paths where two have the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _table(title: str, runs: Sequence[str], rows: Mapping[str, list[Any]], show: Callable[[str, Any], str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for run in runs:
        table.add_column(run, justify="right", overflow="fold")
    for name, values in rows.items():
        table.add_row(name, *(Text(show(name, value)) for value in values))  # which may have what rich takes for markup
    return table


def _setting(_: str, value: Any) -> str:
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return "-" if value is None else text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _number(name: str, value: Value) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if "seconds" in name and value >= 60:
        return duration(value)
    is_count = name in ("steps", "alarms", "completion tokens")
    return f"{value:,.0f}" if is_count else f"{value:,.4g}"
