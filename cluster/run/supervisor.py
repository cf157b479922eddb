"""Keeps a run going when its learner dies, and brings it to an orderly end when it cannot go on."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING

from cluster.actors.restarts import RestartBudget, RestartLimit
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ActorDiedError, ActorError, LearnerDiedError, LostBytesError, PreceptorError
from cluster.monitoring.alarms import LengthCap
from cluster.run.checkpoints import RunState, find_resume_point
from cluster.run.driver import train
from cluster.run.hooks import Hooks, RunContext, StepHook
from cluster.run.inputs import Inputs
from cluster.run.ledger import Ledger
from cluster.run.probe import Probe
from cluster.run.summary import RunSummary
from learner.checkpointing.checkpoint import step_folder

if TYPE_CHECKING:
    from cluster.monitoring.sinks import TerminalView
    from cluster.run.pools import Pipeline


@dataclass
class Supervisor:
    """Runs the loop; after the death of a learner's rank, everything goes back to the last intact checkpoint.

    Deaths of rollout and teacher workers are their pools' own affair and lose nothing.
    """

    config: Config
    inputs: Inputs
    pipeline: "Pipeline"
    directory: RunDirectory
    view: "TerminalView"
    stop: Event
    make_hooks: Callable[[RunContext], Sequence[StepHook]]

    def __post_init__(self) -> None:
        self._budget = RestartBudget(RestartLimit(self.config.ray.max_restarts, self.config.ray.restart_window_seconds))
        self._is_first_attempt = True
        self._last_step = -1  # done when the learner died last

    def train(self, beginning: RunState | RunSummary) -> RunSummary:
        """Do the run's steps after a checkpoint's, or all with the summary so far, and return what it achieved.

        Raises:
            RunStopped: a signal requested it; a checkpoint is written.
            PreceptorError: the run cannot go on; a checkpoint of its last step is written if the learner lives.
        """
        start = beginning
        while True:
            try:
                return self._attempt(start)
            except (LearnerDiedError, LostBytesError) as error:
                start = self._rewind(error) or beginning

    def _attempt(self, start: RunState | RunSummary) -> RunSummary:
        """Bring the run's files, and the learner if it has done anything yet, to where the run begins; then train."""
        step, history = (start.step, start.history) if isinstance(start, RunState) else (0, start)
        directory, rollout = self.directory, self.config.rollout
        run = RunContext(
            self.config,
            self.inputs,
            self.pipeline,
            directory,
            self.view,
            first_step=step,
            history=deepcopy(history),
            ledger=Ledger(directory.ledger, step),
            length_cap=LengthCap(rollout.max_completion_tokens, rollout.max_staleness, rollout.horizon),
            probe=self._probe(start),
            stop=self.stop,
            is_first_attempt=self._is_first_attempt,
            teacher_states=dict(start.teachers) if isinstance(start, RunState) else {},
        )
        self._is_first_attempt = False
        hooks = Hooks(self.make_hooks(run))
        if isinstance(start, RunState):
            run.ledger.check(start.ledger)
            self.pipeline.learner.load_checkpoint(step_folder(directory.checkpoints, step))
        try:
            with hooks.ending():
                train(run, hooks)
        finally:
            if run.ledger.finished_step > self._last_step:
                self._budget.note_progress(0)
                self._last_step = run.ledger.finished_step
        return run.history

    def _probe(self, start: RunState | RunSummary) -> Probe:
        section = self.config.rollout.privileged
        if section is None:
            return Probe()
        return Probe(section, self.inputs.privileged, start.probe if isinstance(start, RunState) else None)

    def _rewind(self, error: PreceptorError) -> RunState | None:
        """Start the learner again, let the pools forget what they do, and find the last intact checkpoint."""
        try:
            delay = self._budget.take(0, "the learner", error)
        except ActorError as final:
            raise ActorError(f"{final}; go on with preceptor train --resume {self.directory.path}") from error
        self.view.say(f"{error}; the learner is started again, and the run goes back to its last checkpoint")
        time.sleep(delay)
        try:
            self.pipeline.learner.start_again()
            self.pipeline.teachers.abandon()
            self.pipeline.rollouts.abandon()
        except ActorDiedError as another:
            return self._rewind(another)
        return find_resume_point(self.directory, self.config, self.view.say)
