"""Reports on a run from its directory alone, while it lives and after."""

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import PoolState
from cluster.contracts.files import RecordsFile
from cluster.monitoring.status_file import Status, read_status

_CHECKPOINT = re.compile(r"step-([0-9]+)")  # as learner/checkpointing/checkpoint.py names complete ones
_HELD_OUT = "held_out/"
MOVES_SHOWN = 5


class PoolReport(msgspec.Struct, frozen=True):
    """Describes one pool after the latest step."""

    name: str
    workers: list[str]  # that serve
    wanted: int
    restarts: int
    owed: int  # completions of a rollout pool, batches of a teacher's
    policy_version: int | None  # None: its weights never change
    busy_share: float | None  # None: no step says
    idle_share: float | None
    tokens_per_second: float | None
    model: str = ""  # of a teacher
    checkpoint: str = ""  # fingerprint of its files


class RunReport(msgspec.Struct, frozen=True):
    """Describes a run as its directory shows it."""

    run: str
    directory: str
    state: str  # starting, running, ended, stopped, failed, lost; unknown: it never said
    error: str
    step: int
    steps: int
    seconds_since_change: float | None
    tokens_per_second: float | None  # completion tokens, of the latest step
    queued_completions: float | None  # mean over the latest step
    queued_batches: float | None
    pools: list[PoolReport]
    last_checkpoint: int | None  # step
    alarms: list[dict[str, Any]]
    moves: list[dict[str, Any]]  # of workers between pools, and what became of them; the latest few
    held_out: dict[str, float]  # of the latest evaluation, with its step


def read_report(path: Path) -> RunReport:
    """Read a run's directory; raises CheckpointError where it holds no run, or a file in it is damaged."""
    directory = RunDirectory.open(path)
    config = directory.read_config()
    status = read_status(directory.status)
    records = RecordsFile(directory.metrics).read()
    latest = records[-1] if records else {}
    return RunReport(
        run=config.run.name,
        directory=str(path),
        state=status.state if status else "unknown",
        error=status.error if status else "",
        step=status.step if status and status.step else int(latest.get("step", 0)),
        steps=(status and status.steps) or config.run.steps,
        seconds_since_change=round(time.time() - status.changed_at, 1) if status else None,
        tokens_per_second=latest.get("step/tokens_per_second"),
        queued_completions=latest.get("generate/queued_completions"),
        queued_batches=latest.get("score/queued_batches"),
        pools=[_pool(pool, status, latest) for pool in status.pools] if status else [],
        last_checkpoint=_last_checkpoint(directory.checkpoints),
        alarms=RecordsFile(directory.alarms).read(),
        moves=RecordsFile(directory.moves).read()[-MOVES_SHOWN:],
        held_out=_held_out(records),
    )


def print_status(path: Path, as_json: bool) -> None:
    """Print how a run stands, as JSON or for people."""
    report = read_report(path)
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
        return
    console = Console(highlight=False)
    for line in _lines(report):
        console.print(line, markup=False, soft_wrap=True)
    if report.pools:
        console.print(_table(report))


def _pool(pool: PoolState, status: Status, record: Mapping[str, float]) -> PoolReport:
    def metric(name: str) -> float | None:
        return record.get(f"pool/{pool.name}/{name}")

    return PoolReport(
        pool.name,
        list(pool.serving),
        pool.num_wanted,
        pool.num_restarts,
        pool.num_owed,
        None if pool.name.startswith("teacher-") else status.step,
        metric("busy_share"),
        metric("idle_share"),
        metric("tokens_per_second"),
        pool.model,
        pool.checkpoint,
    )


def _last_checkpoint(folder: Path) -> int | None:
    names = [_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name[1]) for name in names if name), default=None)


def _held_out(records: list[dict[str, Any]]) -> dict[str, float]:
    for record in reversed(records):
        metrics = {name.removeprefix(_HELD_OUT): value for name, value in record.items() if name.startswith(_HELD_OUT)}
        if metrics:
            return {"step": record["step"], **metrics}
    return {}


def _lines(report: RunReport) -> list[str]:
    since = "" if report.seconds_since_change is None else f", {report.seconds_since_change:.0f} s since it changed"
    lines = [f"{report.run}: {report.state}, step {report.step} of {report.steps}{since}"]
    if report.error:
        lines.append(report.error)
    if report.tokens_per_second is not None:
        queues = f"{report.queued_completions or 0:.0f} completions and {report.queued_batches or 0:.1f} batches queued"
        lines.append(f"{report.tokens_per_second:,.0f} completion tokens/s; {queues} on average")
    if report.held_out:
        shown = ((name, report.held_out.get(name)) for name in ("accuracy", "kl", "completion_length"))
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in shown if value is not None)
        lines.append(f"held-out after step {report.held_out['step']:.0f}: {metrics}")
    lines += [f"{pool.name}: {pool.model} ({pool.checkpoint[:12]})" for pool in report.pools if pool.model]
    checkpoint = "none yet" if report.last_checkpoint is None else f"step {report.last_checkpoint}"
    lines.append(f"last checkpoint: {checkpoint}")
    lines += [f"balance after step {move['step']}: {move['sentence']}" for move in report.moves]
    lines += [f"alarm {alarm['alarm']} at step {alarm['step']} ({alarm['action']})" for alarm in report.alarms]
    return lines


def _table(report: RunReport) -> Table:
    table = Table()
    table.add_column("pool")
    for label in ("serve", "restarts", "owed", "weights", "busy", "idle", "tokens/s"):
        table.add_column(label, justify="right")
    for pool in report.pools:
        busy, idle, rate = pool.busy_share, pool.idle_share, pool.tokens_per_second
        table.add_row(
            pool.name,
            f"{len(pool.workers)}/{pool.wanted}",
            str(pool.restarts),
            str(pool.owed),
            "" if pool.policy_version is None else str(pool.policy_version),
            "" if busy is None else f"{busy:.0%}",
            "" if idle is None else f"{idle:.0%}",
            "" if rate is None else f"{rate:,.0f}",
        )
    return table
