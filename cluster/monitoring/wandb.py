"""A run's figures to Weights & Biases, whose package is imported here and only when a run file asks for it."""

import hashlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ConfigError
from cluster.monitoring.observers import Ending, StepSample


class WandbObserver:
    """One W&B run, which a resumed run continues."""

    def __init__(self, config: Config, directory: RunDirectory) -> None:
        """Open the run; the key is the user's, found as wandb finds it."""
        import wandb  # type: ignore[import-not-found]  # not among the dependencies

        self._run: Any = wandb.init(
            project=config.logging.wandb_project,
            name=config.run.name,
            id=_run_id(config.run.name, directory.path),
            resume="allow",
            dir=directory.path,
            config=msgspec.to_builtins(config),
        )

    def on_step(self, seen: StepSample) -> None:
        """Log the step's figures."""
        self._run.log({name: value for name, value in seen.record.items() if math.isfinite(value)}, step=seen.step)

    def close(self, ending: Ending) -> None:
        """End the W&B run."""
        self._run.finish(exit_code=1 if ending == "failed" else 0)


def _run_id(name: str, folder: Path) -> str:
    """Return an id that a resumed run has again, and another run of the same name elsewhere has not."""
    return f"{name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def check_wandb(config: Config) -> None:
    """Check, before anything starts, that what the run file asks for is installed.

    Raises:
        ConfigError: it is not.
    """
    if config.logging.wandb_project is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"logging.wandb_project is {config.logging.wandb_project!r}, but the package wandb is not installed; "
            "install it with `pip install wandb`, or remove the field"
        )
