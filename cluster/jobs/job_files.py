"""What travels with a submitted run: the run file, and the files below the current folder that it names."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.contracts.config import Config
from cluster.contracts.errors import ConfigError

MAX_BYTES = 100 << 20  # the head keeps it in memory, and every node fetches it
SHARED = "put it on storage that all nodes share and give its absolute path"


@dataclass(frozen=True)
class NamedFile:
    """A file or folder that travels."""

    field: str  # who names it
    path: Path  # relative to the current folder, there and here

    @property
    def size_bytes(self) -> int:
        """Return the size of all that it holds."""
        below = [Path(parent, name) for parent, _, names in os.walk(self.path) for name in names]
        return sum(path.stat().st_size for path in (below or [self.path]))


def check_for_cluster(config: Config) -> None:
    """Check that a run can be a job.

    Raises:
        ConfigError: it names a cluster of its own, or would write where nobody looks.
    """
    if config.ray.address is not None:
        raise ConfigError(
            f"ray.address is '{config.ray.address}', but a submitted run uses the cluster that it is submitted to; "
            "remove it"
        )
    if not Path(config.run.directory).is_absolute():
        raise ConfigError(
            f"run.directory is '{config.run.directory}', which on a cluster is below a temporary folder; give an "
            "absolute path on storage that the head and the learner's nodes share: run.directory=/shared/runs"
        )


def files_to_send(config: Config) -> list[NamedFile]:
    """Return what the configuration names by a path relative to the current folder.

    A model that is not there is taken for a hub id; an absolute path is the cluster's.

    Raises:
        ConfigError: a prompt file is missing, a path leads out of the current folder, or all of it is too large.
    """
    files = [
        NamedFile(field, Path(text))
        for field, text, is_model in _named(config)
        if not Path(text).is_absolute() and not (is_model and not Path(text).exists())
    ]
    for file in files:
        if ".." in file.path.parts:
            raise ConfigError(f"{file.field}: '{file.path}' leads out of the current folder; {SHARED}")
        if not file.path.exists():
            raise ConfigError(f"{file.field}: '{file.path}' is not in the current folder")
    _check_size(files)
    return files


def copy_files(run_file: Path, files: list[NamedFile], folder: Path) -> Path:
    """Copy the run file and what it names into a folder, and return where the run file is in it."""
    inside = not run_file.is_absolute() and ".." not in run_file.parts
    place = run_file if inside else Path(run_file.name)
    for source, target in [(run_file, place), *((file.path, file.path) for file in files)]:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, folder / target)
    return place


def _named(config: Config) -> Iterator[tuple[str, str, bool]]:
    """Yield each field that names a file, its text, and whether it is a model."""
    yield "student.model", config.student.model, True
    for name, teacher in config.teachers.items():
        yield f"teachers.{name}.model", teacher.model, True
    yield "prompts.train", config.prompts.train, False
    if config.prompts.held_out is not None:
        yield "prompts.held_out", config.prompts.held_out, False


def _check_size(files: list[NamedFile]) -> None:
    sizes = {file.path: file.size_bytes for file in files}
    if sum(sizes.values()) > MAX_BYTES:
        largest = max(files, key=lambda file: sizes[file.path])
        raise ConfigError(
            f"{largest.field}: '{largest.path}' has {sizes[largest.path] / 1e6:.1f} MB of the "
            f"{sum(sizes.values()) / 1e6:.1f} MB that would travel with the run, and up to {MAX_BYTES / 1e6:.1f} MB "
            f"do; {SHARED}"
        )
