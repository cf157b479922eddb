"""Sends a run's metrics to TensorBoard and to Weights & Biases, whose packages are optional."""

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ConfigError
from cluster.contracts.files import Record
from cluster.monitoring.observers import Ending, StepObserver, StepSample


def check_trackers(config: Config) -> None:
    """Raise ConfigError, before anything starts, where the package of a tracker in the run file is not installed."""
    logging = config.logging
    wanted = {
        "tensorboard": ("logging.tensorboard is true", logging.tensorboard),
        "wandb": (f"logging.wandb_project is {logging.wandb_project!r}", logging.wandb_project is not None),
    }
    for package, (setting, is_wanted) in wanted.items():
        if is_wanted and not _is_installed(package):
            raise ConfigError(
                f"{setting}, but the package {package} is not installed; "
                f"install it with `pip install {package}`, or remove the field"
            )


def open_trackers(config: Config, directory: RunDirectory, first_step: int) -> list[StepObserver]:
    """Return the trackers of the run file; TensorBoard also without being named, where its package is installed."""
    trackers: list[StepObserver] = []
    wanted = config.logging.tensorboard
    if wanted or (wanted is None and _is_installed("tensorboard")):
        trackers.append(TensorBoardObserver(directory.tensorboard, first_step))
    if config.logging.wandb_project is not None:
        trackers.append(WandbObserver(config, directory))
    return trackers


class TensorBoardObserver:
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

    def close(self, ending: Ending) -> None:
        self._writer.close()


class WandbObserver:
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

    def on_step(self, sample: StepSample) -> None:
        self._run.log(_finite(sample.record), step=sample.step)

    def close(self, ending: Ending) -> None:
        self._run.finish(exit_code=1 if ending == "failed" else 0)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _finite(record: Record) -> dict[str, float]:
    return {name: value for name, value in record.items() if math.isfinite(value)}
