"""teachers.jsonl: which checkpoint of each teacher scores from which step on, so that a resumed run goes on with it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.errors import CheckpointError
from cluster.contracts.files import RecordsFile


class Reign(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One checkpoint of a teacher.

    Example:
        >>> Reign(step=12, teacher="math", model="models/math-2", fingerprint="9f3a").teacher
        'math'
    """

    step: int  # first one that it scores, from 1 as in metrics.jsonl
    teacher: str
    model: str
    fingerprint: str  # of its files, as in ledger.jsonl
    by: Literal["configuration", "replacement"] = "configuration"  # why it scores


class TeacherLog:
    """Keeps the file of one run."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Go on after `first_step` completed steps; what is done again is scored by the checkpoints of now.

        Raises:
            CheckpointError: the file is damaged.
        """
        self._file = RecordsFile(path)
        self._latest = latest_reigns(path)
        reigns = read_reigns(path)
        if any(reign.step > first_step + 1 for reign in reigns):
            self._file.drop_from(first_step + 2)
            for reign in self._latest.values():
                if reign.step > first_step + 1:
                    self.note(msgspec.structs.replace(reign, step=first_step + 1))

    def note(self, reign: Reign) -> None:
        """Write down who scores from a step on, if that is new."""
        known = self._latest.get(reign.teacher)
        if known is not None and known.model == reign.model:
            reign = msgspec.structs.replace(reign, by=known.by)  # a resumed run goes on with what replaced another
        if known is None or known != msgspec.structs.replace(reign, step=known.step) or known.step > reign.step:
            self._latest[reign.teacher] = reign
            self._file.write(msgspec.to_builtins(reign))
            self._file.sync()


def read_reigns(path: Path) -> list[Reign]:
    """Return all lines of the file, none where there is none.

    Raises:
        CheckpointError: a line cannot be understood; names it.
    """
    found = []
    for number, line in enumerate(RecordsFile(path).lines(), start=1):
        try:
            found.append(msgspec.json.decode(line, type=Reign))
        except msgspec.DecodeError as error:
            raise CheckpointError(f"{path}:{number}: says of no teacher who scores: {error}") from error
    return found


def latest_reigns(path: Path) -> dict[str, Reign]:
    """Return the latest line of every teacher.

    Raises:
        CheckpointError: the file is damaged.
    """
    return {reign.teacher: reign for reign in read_reigns(path)}


def with_models(config: Config, models: Mapping[str, str]) -> Config:
    """Return the configuration with other models for some teachers."""
    teachers = {
        name: msgspec.structs.replace(teacher, model=models.get(name, teacher.model))
        for name, teacher in config.teachers.items()
    }
    return msgspec.structs.replace(config, teachers=teachers)


def in_force(path: Path, own: Config, asked: Config) -> Config:
    """Return what a run is resumed with: its teachers as they were replaced while it went on.

    Args:
        path: of teachers.jsonl.
        own: the run's configuration.
        asked: the same with what the command line changes.

    Raises:
        CheckpointError: the command line names another model for a teacher that was replaced.
    """
    replaced = {}
    for name, reign in latest_reigns(path).items():
        teacher = asked.teachers.get(name)
        if teacher is None or teacher.model == reign.model or reign.by == "configuration":
            continue
        if teacher.model != own.teachers[name].model:
            raise CheckpointError(
                f"{path}: teacher {name} is {reign.model} since step {reign.step}, but teachers.{name}.model = "
                f"{teacher.model} is asked for; leave that out and replace it when the run goes on, or remove its "
                "lines from the file"
            )
        replaced[name] = reign.model
    return with_models(asked, replaced)
