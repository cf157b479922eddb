"""Names the files of a run directory; no other module builds their paths."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.run_config import Config
from cluster.config.run_file import MAX_RUN_FILE_BYTES, config_from_json, dump_run_config
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.contracts.files import read_text


@dataclass(frozen=True)
class ControlFiles:
    """Holds the files of one kind of control request and its answer."""

    request: Path
    answer: Path


class RunDirectory:
    """Names the files of one run; only their owner may read them, since they hold models and prompts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"  # the resolved configuration
        self.prompts = path / "prompts.json"  # how many prompts the run began with, and their checksums
        self.status = path / "status.json"  # kept fresh while the run lives
        self.lock = path / "lock"  # held by the process that trains
        # One JSON object per step, alarm, decision of the balancer, checkpoint of a teacher, held-out completion.
        self.metrics, self.ledger = path / "metrics.jsonl", path / "ledger.jsonl"
        self.alarms, self.moves = path / "alarms.jsonl", path / "moves.jsonl"
        self.teachers, self.samples = path / "teachers.jsonl", path / "samples.jsonl"
        self.starts = path / "starts.jsonl"  # of each start of the run: after which step, when, on what machines
        self.score_audit = path / "score_audit"  # each teacher's first answers to the trajectories of its audits
        self.scaling = ControlFiles(path / "scale-request.json", path / "scale-answer.json")
        self.replacing = ControlFiles(path / "teacher-request.json", path / "teacher-answer.json")
        self.tensorboard = path / "tensorboard"
        self.trace = path / "trace.json"
        self.kept_rows = path / "kept_rows"  # a few trajectories of each step, as contracts/kept_rows.py has them
        self.rows = path / "rows"  # all that it learned from, as contracts/recorded_rows.py has them
        self.logs = path / "logs"  # what failed workers and their engines have printed
        self.checkpoints = path / "checkpoints"  # each complete or absent
        self.export = path / "export"  # the trained student as a Hugging Face directory

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make the folder of a new run and write its configuration; raise ConfigError as `refuse_taken` does."""
        cls.refuse_taken(config)
        directory = cls(Path(config.run.directory) / config.run.name)
        try:
            for folder in reversed([directory.path, *directory.path.parents]):
                folder.mkdir(mode=0o700, exist_ok=True)
            directory.config.touch(mode=0o600, exist_ok=False)  # of two runs that start at once, one gets the name
            directory.path.chmod(0o700)  # it may have been there already
            directory.config.write_text(dump_run_config(config), encoding="utf-8")
        except FileExistsError:
            cls.refuse_taken(config)
            raise
        except OSError as error:
            raise ConfigError(_unwritable(directory.path, error.strerror)) from error
        return directory

    @classmethod
    def refuse_taken(cls, config: Config) -> None:
        """Raise ConfigError if the folder of a new run holds a run already, or cannot be made."""
        directory = cls(Path(config.run.directory) / config.run.name)
        if os.path.lexists(directory.config):
            raise ConfigError(
                f"{directory.path}: holds a run already; continue it with --resume {directory.path} "
                "or choose another run.name"
            )
        nearest = next(folder for folder in (directory.path, *directory.path.parents) if os.path.lexists(folder))
        if not nearest.is_dir():
            raise ConfigError(_unwritable(directory.path, f"{nearest} is not a folder"))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigError(_unwritable(directory.path, f"{nearest} is not writable"))

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the folder of an earlier run; raise CheckpointError if it holds none, or is another user's."""
        directory = cls(path)
        try:
            holds_run = directory.config.is_file()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot look for a run there: {error.strerror}") from error
        if not holds_run:
            raise CheckpointError(f"{path}: holds no run (there is no {directory.config.name})")
        return directory

    def read_config(self, overrides: Sequence[str] = ()) -> Config:
        """Return the configuration that the run was started with, changed by `section.field=value` overrides."""
        text = read_text(self.config, "run's configuration", ConfigError, MAX_RUN_FILE_BYTES)
        return config_from_json(text, overrides, source=str(self.config))


def _unwritable(path: Path, reason: str | None) -> str:
    return f"{path}: cannot make the run directory: {reason}; name another folder in run.directory"
