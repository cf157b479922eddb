"""The checkpoints of one run: begun after a step, completed beside the next ones; and where a run goes on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.contracts.config import CheckpointConfig, Config
from cluster.contracts.errors import CheckpointError
from cluster.history import History
from cluster.ledger import LedgerState
from cluster.run_directory import RunDirectory
from learner.checkpoint import checkpoints, prune, read_state, step_folder, step_of
from learner.group import LearnerGroup
from learner.manifest import STATE_FILE, Layout, verify
from learner.pending_checkpoint import PendingCheckpoint


class RunState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The driver's part of a checkpoint."""

    step: int  # completed
    history: History
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
