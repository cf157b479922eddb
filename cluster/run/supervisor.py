"""Keeps a run going when its learner dies, and brings it to an orderly end when it cannot go on."""

import time
from copy import deepcopy
from dataclasses import dataclass

from cluster.actors.replicas import RestartBudget
from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.errors import (
    ActorDiedError,
    ActorError,
    LearnerDiedError,
    LostBytesError,
    PreceptorError,
    RunStopped,
)
from cluster.monitoring.sinks import TerminalView
from cluster.nodes.interruption import StopRequest
from cluster.run.checkpoints import ResumePoint, RunSummary, find_resume_point
from cluster.run.driver import train
from cluster.run.inputs import Inputs
from cluster.run.pools import Pipeline, restart_limit
from cluster.run.training_run import TrainingRun


@dataclass(frozen=True)
class Beginning:
    """Where a training run begins."""

    directory: RunDirectory
    history: RunSummary
    point: ResumePoint | None = None  # None: at the first step


class Supervisor:
    """Runs the loop; after the death of a learner's rank, everything goes back to the last intact checkpoint.

    Deaths of rollout and teacher workers are their pools' own affair and lose nothing.
    """

    def __init__(
        self, config: Config, inputs: Inputs, pipeline: Pipeline, view: TerminalView, stop: StopRequest
    ) -> None:
        """Take what a run needs besides its beginning."""
        self._config = config
        self._inputs = inputs
        self._pipeline = pipeline
        self._view = view
        self._stop = stop
        self._budget = RestartBudget(restart_limit(config))
        self._has_begun = False

    def train(self, beginning: Beginning) -> RunSummary:
        """Do the run's steps, and return what it achieved.

        Raises:
            RunStopped: somebody asked for it; a checkpoint is written.
            PreceptorError: the run cannot go on; a checkpoint of its last step is written if the learner lives.
        """
        start = beginning
        while True:
            try:
                return self._attempt(start)
            except (LearnerDiedError, LostBytesError) as error:
                start = self._rewind(beginning, error)

    def _attempt(self, start: Beginning) -> RunSummary:
        run = self._restore(start)
        try:
            with run.observers:
                train(run)
            return run.history
        except (LearnerDiedError, LostBytesError, RunStopped):
            raise
        except PreceptorError as error:
            run.save_after(error)
            raise

    def _restore(self, start: Beginning) -> TrainingRun:
        """Bring the run's files, and the learner if it has done anything yet, to where the run is to begin."""
        step = start.point.state.step if start.point else 0
        history = deepcopy(start.history)
        run = TrainingRun(
            self._config, self._inputs, self._pipeline, start.directory, self._view, step, history, self._stop
        )
        if not self._has_begun:  # after a rewind the pools still have their sizes
            run.restore_pools()
            self._has_begun = True
        if start.point:
            run.ledger.check(start.point.state.ledger)
            self._pipeline.learner.load_checkpoint(start.point.folder)
        return run

    def _rewind(self, beginning: Beginning, error: PreceptorError) -> Beginning:
        """Start the learner again, let the pools forget what they do, and find the last intact checkpoint."""
        directory = beginning.directory
        delay = self._budget.spend(0)
        if delay is None:
            limit = restart_limit(self._config)
            raise ActorError(
                f"{error}; the learner has no restart left of the {limit.max_restarts} that ray.max_restarts allows "
                f"within {limit.window_seconds:.0f} s; go on with preceptor train --resume {directory.path}"
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
