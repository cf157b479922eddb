"""Gives teachers that are the student itself its weights, as `teachers.NAME.refresh` says.

The version of a teacher's weights is the number of optimizer steps behind them; 0: those that the run began with.
"""

from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.config.stages import RefreshConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ConfigError
from cluster.contracts.files import Record
from cluster.run.hooks import RunContext, StepHook, TeacherState

if TYPE_CHECKING:
    from cluster.run.evaluation import Evaluations
    from learner.group import LearnerGroup


class SelfTeachers:
    """Sends weights from the learner to the pools of teachers that take them; what they have stands in the run."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._teachers = {name: teacher for name, teacher in run.config.teachers.items() if teacher.receives_weights}

    def begin(self) -> None:
        """Give every pool what it has at the run's first step, and from then on every worker that comes later."""
        learner, pools = self._run.pipeline.learner, self._run.pipeline.teachers.pools
        for name in self._teachers:
            self._send(name, self._run.teacher_states.get(name, TeacherState()).version, takes_weights=False)
            pools[name].replicas.prepare_with(partial(_bring, learner, name))

    def after(self, step: int) -> Record:
        """Send what is due after so many steps, and return what it took; gates wait for their evaluations."""
        due = [name for name, teacher in self._teachers.items() if teacher.version_due(step) == step]
        return self.refresh(due, step)

    def refresh(self, names: Sequence[str], step: int) -> Record:
        """Give teachers the student's weights of now, or its average."""
        if not names:
            return {}
        began = perf_counter()
        num_bytes = sum(self._send(name, step, takes_weights=True) for name in names)
        return {"refresh/seconds": perf_counter() - began, "refresh/bytes": num_bytes}

    def _send(self, name: str, version: int, takes_weights: bool) -> int:
        pool = self._run.pipeline.teachers.pools[name]
        report = self._run.pipeline.learner.refresh_teacher(name, pool.replicas.prepared, version, takes_weights)
        state = self._run.teacher_states.get(name, TeacherState())
        self._run.teacher_states[name] = msgspec.structs.replace(state, version=version)
        return report.num_bytes


def _bring(learner: "LearnerGroup", name: str, actor: Any) -> list[Any]:
    """Begin to give a worker of a teacher what the others have, and return what it waits for before it serves."""
    return [learner.bring_teacher(name, actor)]


class TeacherGates(StepHook):
    """Refreshes teachers after evaluations whose metric is better than any before."""

    def __init__(self, run: RunContext, evaluations: "Evaluations") -> None:
        super().__init__(run)
        self._evaluations = evaluations
        self._gates = {
            name: teacher.refresh
            for name, teacher in run.config.teachers.items()
            if isinstance(teacher.refresh, RefreshConfig) and teacher.refresh.gate is not None
        }

    def begin(self) -> None:
        """Take the student before training as the best so far."""
        for name, refresh in self._gates.items():
            if self.run.first_step:
                continue
            latest = self._evaluations.latest
            if refresh.gate not in latest:
                known = ", ".join(sorted(latest))
                raise ConfigError(f"teachers.{name}.refresh.gate is '{refresh.gate}', and evaluations have {known}")
            self._note(name, latest[refresh.gate])

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        opened = []
        for name, refresh in self._gates.items():
            value, best = metrics.get(str(refresh.gate)), self.run.teacher_states[name].best
            sign = 1 if refresh.better == "higher" else -1
            if value is None or (best is not None and not sign * value > sign * best):
                continue
            self._note(name, value)
            opened.append(name)
            self.run.view.say(f"teacher {name}: {refresh.gate} is {value:.4f}, so it takes the weights of step {step}")
        return SelfTeachers(self.run).refresh(opened, step)

    def _note(self, name: str, value: float) -> None:
        states = self.run.teacher_states
        states[name] = msgspec.structs.replace(states.get(name, TeacherState()), best=value)
