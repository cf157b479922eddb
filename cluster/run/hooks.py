"""Defines what happens around each step: hooks, which the driver calls in the order of one list."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import PreceptorError
from cluster.contracts.files import Record
from cluster.contracts.import_path import load_object

if TYPE_CHECKING:
    from cluster.config.run_directory import RunDirectory
    from cluster.monitoring.alarms import LengthCap
    from cluster.monitoring.sinks import TerminalView
    from cluster.run.flow import Flow
    from cluster.run.inputs import Inputs
    from cluster.run.ledger import Ledger
    from cluster.run.pools import Pipeline
    from cluster.run.probe import Probe
    from cluster.run.summary import RunSummary


class TeacherState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says what a teacher has whose weights follow the student's; part of every checkpoint."""

    version: int = 0  # optimizer steps behind its weights
    best: float | None = None  # value of its gate's metric so far


@dataclass
class RunContext:
    """Holds what the loop and the hooks share in one attempt at a run."""

    config: Config
    inputs: "Inputs"
    pipeline: "Pipeline"
    directory: "RunDirectory"
    view: "TerminalView"
    first_step: int  # steps that were completed before this attempt
    history: "RunSummary"
    ledger: "Ledger"
    length_cap: "LengthCap"  # alarms lower it, and the horizon raises it
    probe: "Probe"  # chooses prompts for a privileged sampler, if there is one
    stop: Event  # from outside: the run stops after its step, with a checkpoint
    is_first_attempt: bool = True  # of this driver process: else the pools have run before
    error: PreceptorError | None = None  # set by a hook: the run stops after its step in the same way, and raises it
    teacher_states: dict[str, TeacherState] = field(default_factory=dict)  # [teachers.NAME] whose weights change
    flow: "Flow" = field(init=False)  # set before the hooks begin

    @property
    def is_over(self) -> bool:
        return self.ledger.finished_step == self.config.run.steps


class StepHook:
    """Does nothing around a step; a hook overrides what it needs.

    A hook is made anew when the run goes back to a checkpoint. An exception of a hook ends the run.
    """

    def __init__(self, run: RunContext) -> None:
        """Prepare for the steps after `run.first_step`; the pools run, and nothing was requested of them."""
        self.run = run

    def begin(self) -> None:
        """Act once before the first step; the rollout workers have the student's weights."""

    def before_step(self, step: int) -> None:
        """Act before the requests of a step, from 0, go out; up to `max_staleness` earlier steps are under way."""

    def while_waiting(self) -> None:
        """Act between two events of the pools, at least every second; returns at once."""

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Act after a step, from 1, when the weights are published; return further metrics of the step.

        Args:
            step: completed optimizer steps.
            metrics: of the step, those that earlier hooks returned included.
            batches: that the step learned from.
        """
        return {}

    def end(self, error: BaseException | None) -> None:
        """Act when the attempt is over; `error` ended it, None: all steps are done. The last hook ends first."""


class Hooks:
    """Calls all hooks of a run, in order."""

    def __init__(self, hooks: Sequence[StepHook]) -> None:
        self._hooks = hooks

    def begin(self) -> None:
        for hook in self._hooks:
            hook.begin()

    def before_step(self, step: int) -> None:
        for hook in self._hooks:
            hook.before_step(step)

    def while_waiting(self) -> None:
        for hook in self._hooks:
            hook.while_waiting()

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> None:
        """Call after a step, from 1; each hook receives the metrics that those before it returned."""
        for hook in self._hooks:
            metrics = {**metrics, **hook.after_step(step, metrics, batches)}

    @contextmanager
    def ending(self) -> Iterator[None]:
        """End every hook with the context, the last one first, whatever the others raise."""
        with ExitStack() as stack:
            for hook in self._hooks:
                stack.push(lambda _kind, error, _trace, hook=hook: hook.end(error))
            yield


def load_hooks(config: Config) -> list[Callable[[RunContext], StepHook]]:
    """Import the hooks that the run file names."""
    return [load_object(path, "a step hook") for path in config.run.hooks]
