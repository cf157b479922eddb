"""Writes the checkpoints of one run beside training, and finds the one from which a run goes on."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import CheckpointError, LearnerDiedError, LostBytesError, PreceptorError, RunStopped
from cluster.contracts.files import Record, RecordsFile
from cluster.run.hooks import RunContext, StepHook, TeacherState
from cluster.run.ledger import LedgerState
from cluster.run.probe import ProbeState
from cluster.run.summary import RunSummary
from learner.checkpointing.checkpoint import checkpoints, prune, read_state, step_folder, step_of, tidy
from learner.checkpointing.manifest import STATE_FILE, Layout, verify

if TYPE_CHECKING:
    from learner.checkpointing.checkpoint import PendingCheckpoint


class RunState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Holds the driver's part of a checkpoint."""

    step: int  # completed
    history: RunSummary
    ledger: LedgerState
    teachers: dict[str, TeacherState] = {}  # [teachers.NAME] whose weights change
    probe: ProbeState = ProbeState()  # of a privileged sampler's prompts


class Checkpoints(StepHook):
    """Writes one checkpoint at a time beside training, and returns as a step's metrics what a complete one cost.

    What cannot be written is a CheckpointError of this call or of a later one.
    """

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._directory = run.directory.checkpoints
        tidy(self._directory, run.first_step)
        self._pending: PendingCheckpoint | None = None  # None: nothing is being written
        self._saved_step = run.first_step

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Complete the checkpoint that is being written if that takes no waiting."""
        return self.complete() if self._pending is not None and self._pending.is_written else {}

    def save(self) -> None:
        """Begin to write a checkpoint of the last finished step, when the one before is complete."""
        run = self.run
        step = self._saved_step = run.ledger.finished_step
        RecordsFile(run.directory.metrics).sync()  # a resumed run reads it again
        self.complete()
        state = RunState(step, run.history, run.ledger.state(), dict(run.teacher_states), run.probe.state)
        folder = step_folder(self._directory, step)
        self._pending = run.pipeline.learner.begin_checkpoint(folder, msgspec.to_builtins(state))

    def complete(self) -> Record:
        """Wait for the checkpoint that is being written, if one is, and return what it cost."""
        if self._pending is None:
            return {}
        pending, self._pending = self._pending, None
        seconds = pending.complete()
        prune(self._directory, self.run.config.checkpoint.keep_last)
        return {"checkpoint/held_seconds": seconds.held, "checkpoint/writing_seconds": seconds.writing}

    def end(self, error: BaseException | None) -> None:
        """Leave a checkpoint of the last finished step, as far as that is possible, when an error ends the run."""
        is_saved = isinstance(error, CheckpointError | LearnerDiedError | LostBytesError | RunStopped)
        if is_saved or not isinstance(error, PreceptorError):
            return
        with suppress(PreceptorError):  # the error that ends the run is the one to report
            if self.run.ledger.finished_step > self._saved_step:
                self.save()
            self.complete()


class StepEnd(StepHook):
    """Begins a checkpoint where one is due, and stops the run when a signal or a hook requested it."""

    def __init__(self, run: RunContext, checkpoints: Checkpoints) -> None:
        super().__init__(run)
        self._checkpoints = checkpoints

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Save and stop as is due: raise RunStopped, or a hook's error, when the step's checkpoint is written."""
        run = self.run
        error = run.error
        if error is None and run.stop.is_set() and not run.is_over:
            error = RunStopped(f"stopped after step {step}; go on with preceptor train --resume {run.directory.path}")
        is_last = run.is_over or error is not None
        if is_last or is_due(step, run.config.checkpoint.every_steps):
            self._checkpoints.save()
        if is_last:
            self._checkpoints.complete()
        if error is not None:
            raise error
        return {}


def is_due(step: int, every_steps: int) -> bool:
    """Return whether something that happens every so many steps, never for 0, happens after this one."""
    return every_steps > 0 and step % every_steps == 0


def find_resume_point(directory: RunDirectory, config: Config, say: Callable[[str], object]) -> RunState | None:
    """Return the latest intact checkpoint's state, None if none was written; raise the error if all are damaged."""
    errors = []
    for folder in reversed(checkpoints(directory.checkpoints)):
        try:
            verify(folder, Layout.of(config.learner))
            return read_run_state(folder)
        except CheckpointError as error:
            errors.append(error)
            say(f"warning: passing over a damaged checkpoint: {error}")
    if errors:
        raise errors[0]
    return None


def read_run_state(folder: Path) -> RunState:
    """Return the driver's part of a checkpoint; raise CheckpointError if it is malformed or of another step."""
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
