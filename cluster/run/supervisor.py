"""Keeps a run going when its learner dies, and brings it to an orderly end when it cannot go on."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.actors.replicas import RestartBudget, RestartLimit
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import ActorDiedError, ActorError, LearnerDiedError, LostBytesError, PreceptorError
from cluster.monitoring.alarms import LengthCap
from cluster.run.checkpoints import ResumePoint, find_resume_point
from cluster.run.driver import train
from cluster.run.hooks import Hooks, RunContext, StepHook
from cluster.run.inputs import Inputs
from cluster.run.ledger import Ledger
from cluster.run.summary import RunSummary

if TYPE_CHECKING:
    from cluster.monitoring.sinks import TerminalView
    from cluster.nodes.interruption import StopRequest
    from cluster.run.pools import Pipeline


@dataclass(frozen=True)
class Beginning:
    """Says where a training run begins."""

    directory: RunDirectory
    history: RunSummary
    point: ResumePoint | None = None  # None: at the first step


class Supervisor:
    """Runs the loop; after the death of a learner's rank, everything goes back to the last intact checkpoint.

    Deaths of rollout and teacher workers are their pools' own affair and lose nothing.
    """

    def __init__(
        self,
        config: Config,
        inputs: Inputs,
        pipeline: "Pipeline",
        view: "TerminalView",
        stop: "StopRequest",
        make_hooks: Callable[[RunContext], Sequence[StepHook]],
    ) -> None:
        self._config = config
        self._inputs = inputs
        self._pipeline = pipeline
        self._view = view
        self._stop = stop
        self._make_hooks = make_hooks
        self._limit = RestartLimit(config.ray.max_restarts, config.ray.restart_window_seconds)
        self._budget = RestartBudget(self._limit)
        self._is_first_attempt = True

    def train(self, beginning: Beginning) -> RunSummary:
        """Do the run's steps, and return what it achieved.

        Raises:
            RunStopped: a signal requested it; a checkpoint is written.
            PreceptorError: the run cannot go on; a checkpoint of its last step is written if the learner lives.
        """
        start = beginning
        while True:
            try:
                return self._attempt(start)
            except (LearnerDiedError, LostBytesError) as error:
                start = self._rewind(beginning, error)

    def _attempt(self, start: Beginning) -> RunSummary:
        """Bring the run's files, and the learner if it has done anything yet, to where the run begins; then train."""
        step = start.point.state.step if start.point else 0
        rollout = self._config.rollout
        run = RunContext(
            self._config,
            self._inputs,
            self._pipeline,
            start.directory,
            self._view,
            first_step=step,
            history=deepcopy(start.history),
            ledger=Ledger(start.directory.ledger, step),
            length_cap=LengthCap(rollout.max_completion_tokens, rollout.max_staleness),
            stop=self._stop,
            is_first_attempt=self._is_first_attempt,
        )
        self._is_first_attempt = False
        hooks = Hooks(self._make_hooks(run))
        if start.point:
            run.ledger.check(start.point.state.ledger)
            self._pipeline.learner.load_checkpoint(start.point.folder)
        with hooks.ending():
            train(run, hooks)
        return run.history

    def _rewind(self, beginning: Beginning, error: PreceptorError) -> Beginning:
        """Start the learner again, let the pools forget what they do, and find the last intact checkpoint."""
        directory = beginning.directory
        delay = self._budget.spend(0)
        if delay is None:
            raise ActorError(
                f"{error}; the learner has no restart left of the {self._limit.max_restarts} that ray.max_restarts "
                f"allows within {self._limit.window_seconds:.0f} s; "
                f"go on with preceptor train --resume {directory.path}"
            ) from error
        self._view.say(f"{error}; the learner is started again, and the run goes back to its last checkpoint")
        time.sleep(delay)
        try:
            self._pipeline.teachers.abandon()
            self._pipeline.learner.start_again()
            self._pipeline.rollouts.abandon()
        except ActorDiedError as another:
            return self._rewind(beginning, another)
        point = find_resume_point(directory, self._config, self._view.say)
        return beginning if point is None else Beginning(directory, point.state.history, point)
