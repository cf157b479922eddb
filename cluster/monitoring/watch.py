"""Shows a run from its directory alone while it goes on: `preceptor status RUN --watch`."""

import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.live import Live

from cluster.config.run_directory import RunDirectory
from cluster.monitoring.run_view import RunView
from cluster.monitoring.sinks import REFRESHES_PER_SECOND, PlainView
from cluster.monitoring.status_file import read_status

POLL_SECONDS = 1.0


class Tail:
    """Reads what was added to a file of records since the last time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file_id, self._read_bytes = 0, 0
        self.was_replaced = False  # so that the records last read are those of the whole file

    def read(self) -> list[dict[str, Any]]:
        """Return the new records; all of them again where the file was replaced, as when steps are done again."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            status = self._path.stat()
            self.was_replaced = status.st_ino != self._file_id or status.st_size < self._read_bytes
            if self.was_replaced:
                self._file_id, self._read_bytes = status.st_ino, 0
            file.seek(self._read_bytes)
            added = file.read()
        complete = added[: added.rfind(b"\n") + 1]
        self._read_bytes += len(complete)
        return [record for line in complete.splitlines() if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return a line's record without the values that were not finite; None for what a crash left."""
    try:
        record = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError:
        return None
    return {name: value for name, value in record.items() if value is not None} if "step" in record else None


class Watch:
    """Follows one run from reading to reading."""

    def __init__(self, path: Path, console: Console) -> None:
        directory = RunDirectory.open(path)
        config = directory.read_config()
        self.view = RunView(config.run.name, config.run.steps, ascii_only=console.options.ascii_only)
        self._status = directory.status
        self._metrics, self._alarms = Tail(directory.metrics), Tail(directory.alarms)
        self.error = ""  # what ended the run

    def read(self) -> tuple[bool, list[dict[str, Any]], list[str]]:
        """Return whether the run still goes on, and the steps and alarms that are new, of whole files the last."""
        status = read_status(self._status)  # before the records: what a run that ended wrote is there
        records, alarms = self._metrics.read(), self._alarms.read()
        if status is not None:
            self.view.total_steps = status.steps or self.view.total_steps
        for record in records:
            self.view.add(record, is_new=not self._metrics.was_replaced)
        lines = [f"alarm {alarm['alarm']} at step {alarm['step']} ({alarm['action']})" for alarm in alarms]
        self.view.alarm = lines[-1] if lines else self.view.alarm
        if self._metrics.was_replaced:
            records = records[-1:]
        if self._alarms.was_replaced:
            lines = lines[-1:]
        if status is not None and status.state in ("starting", "running"):
            return True, records, lines
        self.view.state, self.error = ("unknown", "") if status is None else (status.state, status.error)
        return False, records, lines

    def ending(self) -> str:
        """Say how the run ended, and of what."""
        step, reason = int(self.view.record.get("step", 0)), f"; {self.error}" if self.error else ""
        return f"{self.view.name}: {self.view.state}, step {step} of {self.view.total_steps}{reason}"


def watch_status(path: Path, poll_seconds: float = POLL_SECONDS) -> None:
    """Show the run until it ends, or the user leaves: at a terminal as one picture, elsewhere as a line a step."""
    console = Console()
    watch = Watch(path, console)
    if not (console.is_interactive and sys.stdout.isatty()):
        _print_lines(watch, poll_seconds)
        return
    with Live(watch.view, console=console, refresh_per_second=REFRESHES_PER_SECOND):
        while watch.read()[0]:
            time.sleep(poll_seconds)
    console.print(watch.ending(), highlight=False, markup=False)


def _print_lines(watch: Watch, poll_seconds: float) -> None:
    plain, goes_on = PlainView(), True
    while goes_on:
        goes_on, records, alarms = watch.read()
        for record in records:
            plain.show(record)
        for alarm in alarms:
            plain.say(alarm)
        if goes_on:
            time.sleep(poll_seconds)
    plain.say(watch.ending())
