"""The checkpoints of one run: begun after a step, completed beside the next ones; and where a run goes on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.run_config import CheckpointConfig, Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import CheckpointError
from cluster.run.evaluation import Evaluation
from cluster.run.ledger import LedgerState
from learner.checkpointing.checkpoint import PendingCheckpoint, checkpoints, prune, read_state, step_folder, step_of
from learner.checkpointing.manifest import STATE_FILE, Layout, verify
from learner.group import LearnerGroup


@dataclass
class RunSummary:
    """What a run has found so far; part of every checkpoint."""

    teacher_accuracy: dict[str, float | None] = field(default_factory=dict)
    first_accuracy: float | None = None
    last_accuracy: float | None = None
    first_kl: float | None = None  # on held-out prompts where there are any, else on the step's own
    last_kl: float | None = None
    first_sample: dict[str, Any] = field(default_factory=dict)
    last_sample: dict[str, Any] = field(default_factory=dict)

    def note_evaluation(self, found: Evaluation) -> None:
        """Keep what the first and the latest evaluation of the student found."""
        sample = found.samples[0] if found.samples else {}
        if not self.first_sample:
            self.first_accuracy, self.first_sample = found.accuracy, sample
        self.last_accuracy, self.last_sample = found.accuracy, sample
        if found.kl is not None:
            self.note_kl(found.kl)

    def note_kl(self, kl: float) -> None:
        """Keep the first and the latest KL per token."""
        self.first_kl = kl if self.first_kl is None else self.first_kl
        self.last_kl = kl


class RunState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The driver's part of a checkpoint."""

    step: int  # completed
    history: RunSummary
    ledger: LedgerState


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint that was found intact."""

    folder: Path
    state: RunState


class Checkpoints:
    """Writes one checkpoint at a time beside training."""

    def __init__(self, directory: RunDirectory, config: CheckpointConfig, learner: LearnerGroup) -> None:
        """Say where they go, how many stay, and who writes them."""
        self._directory = directory.checkpoints
        self._config = config
        self._learner = learner
        self._pending: PendingCheckpoint | None = None  # None: nothing is being written

    def begin(self, state: RunState) -> None:
        """Begin to write a checkpoint, when the one before is complete.

        Raises:
            CheckpointError: one of them cannot be written.
        """
        self.complete()
        folder = step_folder(self._directory, state.step)
        self._pending = self._learner.begin_checkpoint(folder, msgspec.to_builtins(state))

    def complete_if_written(self) -> dict[str, float]:
        """Complete the checkpoint if that takes no waiting, and return what it cost.

        Raises:
            CheckpointError: it cannot be written.
        """
        return self.complete() if self._pending is not None and self._pending.is_written else {}

    def complete(self) -> dict[str, float]:
        """Wait for the checkpoint that is being written, if one is, and return what it cost.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._pending is None:
            return {}
        pending, self._pending = self._pending, None
        seconds = pending.complete()
        prune(self._directory, self._config.keep_last)
        return {"checkpoint/held_seconds": seconds.held, "checkpoint/writing_seconds": seconds.writing}


def find_resume_point(directory: RunDirectory, config: Config, say: Callable[[str], None]) -> ResumePoint | None:
    """Return the latest intact checkpoint, None when none was written; a damaged one is passed over with a warning.

    Raises:
        CheckpointError: all are damaged; says what is wrong with the latest.
    """
    errors = []
    for folder in reversed(checkpoints(directory.checkpoints)):
        try:
            verify(folder, Layout.of(config.learner))
            return ResumePoint(folder, read_run_state(folder))
        except CheckpointError as error:
            errors.append(error)
            say(f"warning: passing over a damaged checkpoint: {error}")
    if errors:
        raise errors[0]
    return None


def read_run_state(folder: Path) -> RunState:
    """Return the driver's part of a checkpoint.

    Raises:
        CheckpointError: it is missing, malformed, or of another step than the folder's name says.
    """
    try:
        state = msgspec.convert(read_state(folder), RunState)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"checkpoint {folder}: {STATE_FILE} is malformed: {error}") from error
    if state.step != step_of(folder):
        raise CheckpointError(f"checkpoint {folder}: {STATE_FILE} is of step {state.step}")
    expected = tuple(range(state.step + 1, state.step + 1 + len(state.ledger.in_flight)))
    if state.ledger.in_flight != expected:
        raise CheckpointError(
            f"checkpoint {folder}: {STATE_FILE} has steps in flight that do not follow step {state.step}: "
            f"{list(state.ledger.in_flight)}"
        )
    return state
