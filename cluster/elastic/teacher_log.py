"""teachers.jsonl: which checkpoint of each teacher scores from which step on, so that a resumed run goes on with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.errors import CheckpointError
from cluster.contracts.files import RecordsFile


class TeacherVersion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says which checkpoint of a teacher scores from a step on."""

    step: int  # first one that it scores, from 1 as in metrics.jsonl
    teacher: str
    model: str
    fingerprint: str  # of its files, as in ledger.jsonl
    by: Literal["configuration", "replacement"] = "configuration"  # why it scores


class TeacherLog:
    """Keeps the file of one run."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Go on after `first_step` completed steps; what is done again is scored by the checkpoints of now."""
        self._file = RecordsFile(path)
        self._latest = latest_versions(path)
        versions = read_versions(path)
        if any(version.step > first_step + 1 for version in versions):
            self._file.drop_from(first_step + 2)
            for version in self._latest.values():
                if version.step > first_step + 1:
                    self.note(msgspec.structs.replace(version, step=first_step + 1))

    def note(self, version: TeacherVersion) -> None:
        """Write down which version scores from a step on, if that is new."""
        known = self._latest.get(version.teacher)
        if known is not None and known.model == version.model:
            version = msgspec.structs.replace(version, by=known.by)  # a resumed run goes on with what replaced another
        if known is None or known != msgspec.structs.replace(version, step=known.step) or known.step > version.step:
            self._latest[version.teacher] = version
            self._file.write(msgspec.to_builtins(version))
            self._file.sync()


def read_versions(path: Path) -> list[TeacherVersion]:
    """Return all lines of the file, none where there is none."""
    return RecordsFile(path).decode(TeacherVersion, "says of no teacher who scores")


def latest_versions(path: Path) -> dict[str, TeacherVersion]:
    """Return the latest line of every teacher."""
    return {version.teacher: version for version in read_versions(path)}


def with_models(config: Config, models: Mapping[str, str]) -> Config:
    """Return the configuration with other models for some teachers."""
    teachers = {
        name: msgspec.structs.replace(teacher, model=models.get(name, teacher.model))
        for name, teacher in config.teachers.items()
    }
    return msgspec.structs.replace(config, teachers=teachers)


def in_force(path: Path, own: Config, overridden: Config) -> Config:
    """Return what a run is resumed with, which the command line may have `overridden`: its teachers as last replaced.

    Raises:
        CheckpointError: the command line names another model for a teacher that was replaced.
    """
    replaced = {}
    for name, version in latest_versions(path).items():
        teacher = overridden.teachers.get(name)
        if teacher is None or teacher.model == version.model or version.by == "configuration":
            continue
        if teacher.model != own.teachers[name].model:
            raise CheckpointError(
                f"{path}: teacher {name} is {version.model} since step {version.step}, but teachers.{name}.model = "
                f"{teacher.model} is asked for; leave that out and replace it when the run goes on, or remove its "
                "lines from the file"
            )
        replaced[name] = version.model
    return with_models(overridden, replaced)
