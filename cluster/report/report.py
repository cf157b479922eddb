"""Writes the report of one or several runs: one HTML file that needs nothing else, made from the run directories."""

import base64
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.contracts.errors import ConfigError
from cluster.contracts.files import write_atomically
from cluster.report.advice import advise
from cluster.report.run_data import RunData, curves, facts, read_run
from cluster.report.token_rows import choose_rows, distributions, summarise, token_rows, worst_rows

ASSETS = Path(__file__).parent / "assets"
MOST_RUNS = 8  # as many colours as can be told apart
MOST_CHARACTERS = 4_000  # of a prompt or a completion
MOST_SAMPLES = 16  # held-out prompts
ROWS_SHOWN = 120  # token by token, of all runs together
ENDED = ("ended", "stopped", "failed", "lost")


def write_report(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of some runs to `out`, by default report.html in the first run's directory; return where.

    Raises:
        CheckpointError: a directory holds no run, or a file in it is damaged.
        ConfigError: there are too many runs for one picture, or the file cannot be written.
    """
    if len(paths) > MOST_RUNS:
        raise ConfigError(f"report: {len(paths)} runs; one report compares up to {MOST_RUNS}")
    runs = [read_run(path) for path in paths]
    out = out or paths[0] / "report.html"
    html = render(runs)
    try:
        out.touch(mode=0o600)
        write_atomically(out, html)
        out.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"{out}: cannot write the report: {error.strerror}; name another file with --out") from error
    return out


def render(runs: Sequence[RunData]) -> str:
    """Return the report as HTML; every text of a run is escaped or inside of compressed data."""
    from jinja2 import Environment, FileSystemLoader

    names = _names(runs)
    shown = [_shown(run, name, ROWS_SHOWN // len(runs)) for run, name in zip(runs, names, strict=True)]
    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shortened"] = shortened
    data = [{key: run[key] for key in ("name", "curves", "events", "distributions", "tokens")} for run in shown]
    return environment.get_template("report.html").render(
        runs=shown,
        labels=list(dict.fromkeys(label for run in shown for label in run["facts"])),
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        script=(ASSETS / "report.js").read_text(encoding="utf-8"),
        plotly=base64.b64encode((ASSETS / "plotly-basic.min.js.gz").read_bytes()).decode(),
        data=base64.b64encode(gzip.compress(json.dumps(data, allow_nan=False).encode(), mtime=0)).decode(),
    )


def shortened(text: str) -> str:
    """Cut a text to what a person reads, and make its control characters visible.

    Example:
        >>> shortened("a\\0b")
        'a\u2400b'
    """
    left_out = len(text) - MOST_CHARACTERS
    text = text if left_out <= 0 else f"{text[:MOST_CHARACTERS]} ... and {left_out:,} more characters"
    return "".join(chr(0x2400 + ord(one)) if ord(one) < 32 and one not in "\n\t" else one for one in text)


def _shown(run: RunData, name: str, most_rows: int) -> dict[str, Any]:
    summary = summarise(run.directory)
    tokens = token_rows(run.directory, summary, choose_rows(summary, most_rows))
    ids = [(row["facts"]["step"], row["facts"]["trajectory_id"]) for row in tokens["rows"]]
    worst = [(summary.steps[row], summary.ids[row]) for row in worst_rows(summary)]
    return {
        "name": name,
        "facts": dict(facts(run)),
        "curves": curves(run),
        "events": [vars(event) for event in run.events],
        "advice": advise(run),
        "distributions": distributions(summary),
        "samples": _samples(run),
        "tokens": tokens,
        "worst": [_worst(tokens["rows"], ids.index(one)) for one in worst if one in ids],
        "missing": missing(run, len(summary.steps)),
    }


def _worst(rows: Sequence[dict[str, Any]], place: int) -> dict[str, Any]:
    row = rows[place]
    texts = {
        kind: "".join(text for text, one in zip(row["texts"], row["kinds"], strict=True) if one == kind)
        for kind in "pc"
    }
    return {"place": place, "prompt": texts["p"], "completion": texts["c"], **row["facts"]}


def _samples(run: RunData) -> list[dict[str, Any]]:
    """Return the held-out prompts that were kept, each with all answers to it, in order."""
    by_prompt: dict[int, dict[str, Any]] = {}
    for sample in run.samples:
        entry = by_prompt.setdefault(
            sample["trajectory_id"], {"prompt": sample["prompt"], "teachers": [], "answers": []}
        )
        entry["answers" if sample["model"] == "student" else "teachers"].append(sample)
    return list(by_prompt.values())[:MOST_SAMPLES]


def missing(run: RunData, num_kept: int) -> list[str]:
    """Say what the report cannot show of a run, and why."""
    needs = run.config.objective.needs
    lines = []
    if not run.records:
        lines.append("No step is done" + (" yet" if run.state not in ENDED else "") + ", so there are no curves.")
    elif run.state not in ENDED:
        lines.append(f"The run is not over: it shows what was there after step {run.step}.")
    if run.state in ("failed", "lost"):
        lines.append(f"The run {run.state if run.state == 'failed' else 'was lost'} after step {run.step}.")
    if not run.samples:
        why = "there are no held-out prompts" if run.config.prompts.held_out is None else "none is evaluated yet"
        lines.append(f"There are no answers to compare: {why}.")
    if not num_kept:
        why = (
            "logging.kept_rows is 0"
            if not run.config.logging.kept_rows
            else "none is kept yet, or the run is of an earlier release"
        )
        lines.append(f"No tokens can be shown: {why}.")
    elif needs.hidden is False and needs.candidates_from != "teacher":
        lines.append(
            "The objective asks the teacher for no tokens of its own choice, so its most likely ones are not known."
        )
    if not run.starts:
        lines.append("Hardware and packages were not recorded (an earlier release, or the run did not start).")
    return lines


def _names(runs: Sequence[RunData]) -> list[str]:
    """Return the runs' names, numbered where two have the same."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, start=1)]
