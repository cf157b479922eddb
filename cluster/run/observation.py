"""Looks at pools and learner once per step, and tells the observers what it saw."""

from collections.abc import Iterable

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle, PoolState, Span
from cluster.contracts.files import Record
from cluster.monitoring.observers import Observers, PoolMetrics, StepObserver, StepSample
from cluster.monitoring.ray_metrics import RayMetrics
from cluster.monitoring.status_file import StatusFile
from cluster.monitoring.trace import Trace
from cluster.monitoring.trackers import open_trackers
from cluster.run.flow import Flow
from cluster.run.pools import Pipeline


def open_observers(config: Config, directory: RunDirectory, first_step: int) -> Observers:
    """Return whom the run file wants to be told about every step after `first_step`."""
    logging = config.logging
    observers: list[StepObserver] = [StatusFile(directory.status, first_step), RayMetrics(config.run.name)]
    observers += open_trackers(config, directory, first_step)
    if logging.trace_steps:
        observers.append(Trace(directory.trace, logging.trace_steps))
    return Observers(observers)


class StepObservation:
    """What is seen of the workers from one step to the next."""

    def __init__(self, pipeline: Pipeline, observers: Observers) -> None:
        self._pipeline = pipeline
        self._observers = observers
        self._flow: Flow | None = None  # None: the run has not begun
        self._spans: list[Span] = []
        self._pools: list[PoolState] = []
        self._figures = PoolMetrics()

    def begin(self, flow: Flow) -> None:
        """Begin with the first step: what was done before it is nobody's figure."""
        self._flow = flow
        self.observe()

    def observe(self) -> dict[str, float]:
        """Return every pool's figures since the last look."""
        pipeline = self._pipeline
        self._spans = [*(self._flow.take_spans() if self._flow else ()), *pipeline.learner.take_spans()]
        teachers = [pool.state() for pool in pipeline.teachers.pools.values()]
        self._pools = [pipeline.rollouts.state(), *teachers, pipeline.learner.state()]
        return self._figures.measure(self._spans, self._pools)

    def report(self, record: Record, batches: Iterable[BatchHandle]) -> None:
        """Tell the observers about the step that was looked at last, and which batches it learned from."""
        lengths = [length for handle in batches for length in handle.num_completion_tokens]
        self._observers.on_step(StepSample(record, lengths, self._spans, self._pools))
