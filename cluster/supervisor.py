"""Keeps a run going when its learner dies, and brings it to an orderly end when it cannot go on."""

import logging
import time
from copy import deepcopy
from dataclasses import dataclass

from cluster.contracts.config import Config
from cluster.contracts.errors import (
    ActorDiedError,
    ActorError,
    LearnerDiedError,
    LostBytesError,
    PreceptorError,
    RunStopped,
)
from cluster.driver import train
from cluster.interruption import StopRequest
from cluster.metric_sinks import TerminalView
from cluster.pipeline import Inputs, Pipeline, restart_limit
from cluster.restarts import RestartBudget
from cluster.run_directory import RunDirectory
from cluster.training_run import History, TrainingRun
from learner.checkpoint import latest_checkpoint

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class Start:
    """Where training begins."""

    first_step: int
    history: History


class Supervisor:
    """Runs the loop; after the death of a learner's rank, everything goes back to the last complete checkpoint.

    Deaths of rollout and teacher workers are their pools' own affair and lose nothing.
    """

    def __init__(
        self, config: Config, inputs: Inputs, pipeline: Pipeline, directory: RunDirectory, view: TerminalView
    ) -> None:
        """Take what a run needs besides its beginning."""
        self._config = config
        self._inputs = inputs
        self._pipeline = pipeline
        self._directory = directory
        self._view = view
        self._budget = RestartBudget(restart_limit(config))

    def train(self, beginning: Start, stop: StopRequest) -> History:
        """Do the run's steps from the beginning, and return what it achieved.

        Raises:
            RunStopped: somebody asked for it; a checkpoint is written.
            PreceptorError: the run cannot go on; a checkpoint of its last step is written if the learner lives.
        """
        start = self._restore(beginning)
        while True:
            run = TrainingRun(
                self._config,
                self._inputs,
                self._pipeline,
                self._directory,
                self._view,
                start.first_step,
                start.history,
                stop,
            )
            try:
                train(run)
                return run.history
            except (LearnerDiedError, LostBytesError) as error:
                start = self._rewind(error, beginning)
            except RunStopped:
                raise
            except PreceptorError:
                run.save_unsaved()
                raise

    def _rewind(self, error: PreceptorError, beginning: Start) -> Start:
        """Start the learner again and put it, the pools and the run's files back to the last complete checkpoint."""
        delay = self._budget.spend(0)
        if delay is None:
            limit = restart_limit(self._config)
            raise ActorError(
                f"{error}; the learner has no restart left of the {limit.max_restarts} that ray.max_restarts allows "
                f"within {limit.window_seconds:.0f} s; go on with preceptor train --resume {self._directory.path}"
            ) from error
        _log.warning("%s; the learner is started again and the run goes back to its last checkpoint", error)
        time.sleep(delay)
        try:
            self._pipeline.teachers.abandon()
            self._pipeline.learner.start_again()
            self._pipeline.rollouts.abandon()
            return self._restore(beginning)
        except ActorDiedError as another:
            return self._rewind(another, beginning)

    def _restore(self, beginning: Start) -> Start:
        """Bring the learner to the last complete checkpoint, if there is one, and say where the run goes on."""
        checkpoint = latest_checkpoint(self._directory.checkpoints)
        if checkpoint is None:
            return Start(0, deepcopy(beginning.history))
        state = self._pipeline.learner.load_checkpoint(checkpoint)
        return Start(int(state["step"]), History(**state["history"]))
