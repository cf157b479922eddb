"""Sends a run's metrics, and tables of kept rows, to TensorBoard, Weights & Biases and Trackio: optional packages."""

import hashlib
import html
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import pyarrow as pa

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.contracts.files import Record
from cluster.contracts.kept_rows import KeptRowFiles
from cluster.monitoring.observers import Ending, StepObserver, StepSample

TABLE = "samples"
SAMPLE_COLUMNS = ("step", "prompt", "completion", "reward", "KL")
SHOWN_CHARACTERS = 4000  # of a prompt, and of a completion

SampleRow = tuple[int, str, str, float | None, float]  # as SAMPLE_COLUMNS; KL is estimated from the sampled tokens


def check_trackers(config: Config) -> None:
    """Raise ConfigError, before anything starts, where the package of a tracker in the run file is not installed."""
    logging = config.logging
    wanted = {
        "tensorboard": ("logging.tensorboard is true", logging.tensorboard),
        "wandb": (f"logging.wandb_project is {logging.wandb_project!r}", logging.wandb_project is not None),
        "trackio": (f"logging.trackio_project is {logging.trackio_project!r}", logging.trackio_project is not None),
    }
    for package, (setting, is_wanted) in wanted.items():
        if is_wanted and not _is_installed(package):
            raise ConfigError(
                f"{setting}, but the package {package} is not installed; "
                f"install it with `pip install {package}`, or remove the field"
            )


def open_trackers(config: Config, directory: RunDirectory, first_step: int) -> list[StepObserver]:
    """Return the trackers of the run file; TensorBoard also without being named, where its package is installed."""
    trackers: list[Tracker] = []
    logging = config.logging
    if logging.tensorboard or (logging.tensorboard is None and _is_installed("tensorboard")):
        trackers.append(TensorBoardTracker(directory.tensorboard, first_step))
    if logging.wandb_project is not None:
        trackers.append(WandbTracker(config, directory))
    if logging.trackio_project is not None:
        trackers.append(TrackioTracker(config))
    if not (trackers and logging.sample_table_steps):
        return [*trackers]
    return [*trackers, SampleTables(trackers, KeptRowFiles(directory.kept_rows), logging.sample_table_steps)]


class Tracker(StepObserver, Protocol):
    """Shows metrics, and now and then a table."""

    def add_table(self, rows: Sequence[SampleRow], step: int) -> None:
        """Show some rows, after the metrics of the step."""


class TensorBoardTracker:
    """Writes event files; each start of the run adds one to the folder."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(mode=0o700, exist_ok=True)
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step + 1)

    def on_step(self, sample: StepSample) -> None:
        for name, value in _finite(sample.record).items():
            self._writer.add_scalar(name, value, sample.step)
        if sample.completion_lengths:
            self._writer.add_histogram("rollout/completion_lengths", np.array(sample.completion_lengths), sample.step)
        self._writer.flush()

    def add_table(self, rows: Sequence[SampleRow], step: int) -> None:
        self._writer.add_text(TABLE, markdown(rows), step)

    def close(self, ending: Ending) -> None:
        self._writer.close()


class WandbTracker:
    """Logs to one W&B run, which a resumed run continues."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        import wandb  # type: ignore[import-not-found]  # not among the dependencies

        # A resumed run has this id again, and another run of the same name elsewhere has not.
        folder_digest = hashlib.sha256(str(directory.path.resolve()).encode()).hexdigest()
        self._run: Any = wandb.init(
            project=config.logging.wandb_project,
            name=config.run.name,
            id=f"{config.run.name}-{folder_digest[:8]}",
            resume="allow",
            dir=directory.path,
            config=msgspec.to_builtins(config),
        )
        self._table: Any = wandb.Table

    def on_step(self, sample: StepSample) -> None:
        self._run.log(_finite(sample.record), step=sample.step)

    def add_table(self, rows: Sequence[SampleRow], step: int) -> None:
        self._run.log({TABLE: self._table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])}, step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=1 if ending == "failed" else 0)


class TrackioTracker:
    """Logs to one Trackio run, which a resumed run continues, on this machine or where TRACKIO_SPACE_ID says."""

    def __init__(self, config: Config) -> None:
        import trackio  # type: ignore[import-not-found]  # not among the dependencies

        project, settings = config.logging.trackio_project, msgspec.to_builtins(config)
        self._run: Any = trackio.init(project=project, name=config.run.name, resume="allow", config=settings)
        self._table: Any = trackio.Table

    def on_step(self, sample: StepSample) -> None:
        metrics = {name: value for name, value in _finite(sample.record).items() if name != "step"}  # a reserved name
        self._run.log(metrics, step=sample.step)

    def add_table(self, rows: Sequence[SampleRow], step: int) -> None:
        self._run.log({TABLE: self._table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])}, step=step)

    def close(self, ending: Ending) -> None:
        self._run.finish()


class SampleTables:
    """Gives trackers, every so many steps, the newest kept rows that they have not got; a StepObserver.

    The rows of a step are written beside the loop, so a table may be of the step before.
    """

    def __init__(self, trackers: Sequence[Tracker], files: KeptRowFiles, every_steps: int) -> None:
        self._trackers, self._files, self._every_steps = trackers, files, every_steps
        self._shown_step = 0

    def on_step(self, sample: StepSample) -> None:
        """Raise OSError, as trackers do, where the rows cannot be read."""
        newest = max(self._files.files(), default=0) if sample.step % self._every_steps == 0 else 0
        if newest <= self._shown_step:
            return
        self._shown_step = newest
        try:
            rows = [row for step, table in self._files.read([newest]) for row in sample_rows(table, step)]
        except CheckpointError as error:
            raise OSError(str(error)) from error
        for tracker in self._trackers:
            tracker.add_table(rows, sample.step)

    def close(self, ending: Ending) -> None:
        """Do nothing: the trackers end by themselves."""


def sample_rows(rows: pa.Table, step: int) -> list[SampleRow]:
    """Return prompt, completion, reward and mean log-ratio of sampler and teacher of a step's kept rows."""
    samples: list[SampleRow] = []
    for row in rows.select(["token_texts", "loss_mask", "reward", "log_ratio"]).to_pylist():
        texts, mask = row["token_texts"], row["loss_mask"]
        begin = mask.index(1) if 1 in mask else len(mask)
        prompt, completion = _shortened("".join(texts[:begin])), _shortened("".join(texts[begin:]))
        samples.append((step, prompt, completion, row["reward"], row["log_ratio"]))
    return samples


def markdown(rows: Sequence[SampleRow]) -> str:
    """Return rows as a table of Markdown, each on one line.

    Example:
        >>> print(markdown([(3, "1 | 2?", "a" + chr(10) + "b", 1.0, 0.25)]))
        | step | prompt | completion | reward | KL |
        |---|---|---|---|---|
        | 3 | 1 &#124; 2? | a&#9166;b | 1 | 0.25 |
    """
    head = [f"| {' | '.join(SAMPLE_COLUMNS)} |", f"|{'---|' * len(SAMPLE_COLUMNS)}"]
    return "\n".join([*head, *(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)])


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else f"{value:.4g}"
    return html.escape(text).replace("|", "&#124;").replace("\n", "&#9166;")


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _finite(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if math.isfinite(value)}
