"""Where a run writes: the only place that builds paths."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.config.run_config import Config
from cluster.config.run_file import MAX_RUN_FILE_BYTES, config_from_json, dump_run_config
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.contracts.files import read_text


@dataclass(frozen=True)
class ControlFiles:
    """The files of one kind of control request and its answer."""

    request: Path
    answer: Path


class RunDirectory:
    """The folder of one run; readable by its owner only, since it holds models and prompts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: Config) -> "RunDirectory":
        """Make the folder of a new run and write its resolved configuration.

        Raises:
            ConfigError: the folder holds a run already.
        """
        directory = cls(Path(config.run.directory) / config.run.name)
        if directory.config.exists():
            raise ConfigError(
                f"{directory.path}: holds a run already; continue it with --resume {directory.path} "
                "or choose another run.name"
            )
        _make_private(directory.path)
        directory.config.touch(mode=0o600)
        directory.config.write_text(dump_run_config(config), encoding="utf-8")
        return directory

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Open the folder of an earlier run.

        Raises:
            CheckpointError: the folder does not hold a run, or is somebody else's.
        """
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

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def alarms(self) -> Path:
        """One JSON object per alarm that went off."""
        return self.path / "alarms.jsonl"

    @property
    def moves(self) -> Path:
        """One JSON object per decision of the balancer."""
        return self.path / "moves.jsonl"

    @property
    def ledger(self) -> Path:
        """One JSON object per step: which trajectories it learned from."""
        return self.path / "ledger.jsonl"

    @property
    def score_audit(self) -> Path:
        """Folder of each teacher's first answers to the rows of its audits."""
        return self.path / "score_audit"

    @property
    def scaling(self) -> ControlFiles:
        """Sizes of pools that were asked for, and what became of that."""
        return ControlFiles(self.path / "scale-request.json", self.path / "scale-answer.json")

    @property
    def replacing(self) -> ControlFiles:
        """A teacher's checkpoint that was asked for, and what became of that."""
        return ControlFiles(self.path / "teacher-request.json", self.path / "teacher-answer.json")

    @property
    def teachers(self) -> Path:
        """One JSON object per checkpoint of a teacher, with the step from which on it scores."""
        return self.path / "teachers.jsonl"

    @property
    def status(self) -> Path:
        """How the run stands; kept fresh while it lives."""
        return self.path / "status.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def trace(self) -> Path:
        """Timeline of the workers, in Chrome's trace format."""
        return self.path / "trace.json"

    @property
    def samples(self) -> Path:
        """Completions of held-out prompts, one JSON object each."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, each complete or absent."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained student as a Hugging Face directory."""
        return self.path / "export"


def _make_private(path: Path) -> None:
    """Make a folder and those above it that are missing, for their owner only, and close one that is there already."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    path.chmod(0o700)
