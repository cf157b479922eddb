"""Observes each step: measures the pools, records metrics, audits teachers and raises alarms."""

from collections.abc import Sequence

import ray

from cluster.contracts.batches import BatchHandle, PoolState, Span
from cluster.contracts.errors import TrainingError
from cluster.contracts.files import Record, RecordsFile
from cluster.monitoring.alarms import Alarms, Raised
from cluster.monitoring.observers import Observers, PoolMetrics, StepObserver, StepSample
from cluster.monitoring.ray_metrics import RayMetrics
from cluster.monitoring.status_file import StatusFile
from cluster.monitoring.trace import Trace
from cluster.monitoring.trackers import open_trackers
from cluster.run.hooks import RunContext, StepHook
from cluster.run.inputs import train_requests, train_sampling
from teacher_workers.audit.checks import Fault
from teacher_workers.audit.runner import ScoreAudit

AUDIT_REQUESTS = 16  # completions of which the rows for the audits of scores are chosen
AUDIT_TOKENS = 64  # of each; an audit reads short rows only


class PoolObservation(StepHook):
    """Measures rollout, teacher and learner pools from one step to the next."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self.spans: list[Span] = []  # of the last step
        self.pools: list[PoolState] = []
        self._metrics = PoolMetrics()

    def before_step(self, step: int) -> None:
        if step == self.run.first_step:
            self._measure()

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        return self._measure()

    def _measure(self) -> Record:
        pipeline = self.run.pipeline
        self.spans = [*self.run.flow.take_spans(), *pipeline.learner.take_spans()]
        teachers = [pool.state() for pool in pipeline.teachers.pools.values()]
        self.pools = [pipeline.rollouts.state(), *teachers, pipeline.learner.state()]
        return self._metrics.measure(self.spans, self.pools)


class ProbeObservation(StepHook):
    """Shows the rewards of each step to the run's probe, and returns what they say of hard prompts."""

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        return self.run.probe.observe(step - 1, batches)


class StepRecords(StepHook):
    """Writes each step's metrics to metrics.jsonl, the terminal and the observers; later metrics are not recorded."""

    def __init__(self, run: RunContext, observation: PoolObservation) -> None:
        super().__init__(run)
        self._observation = observation
        self._file = RecordsFile(run.directory.metrics)
        self._file.drop_from(run.first_step + 1)
        config, directory, logging = run.config, run.directory, run.config.logging
        observers: list[StepObserver] = [StatusFile(directory.status, run.first_step), RayMetrics(config.run.name)]
        observers += open_trackers(config, directory, run.first_step)
        if logging.trace_steps:
            observers.append(Trace(directory.trace, logging.trace_steps))
        self._observers = Observers(observers)

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        self._file.write(metrics)
        self.run.view.show(metrics)
        lengths = [length for handle in batches for length in handle.num_completion_tokens]
        self._observers.on_step(StepSample(metrics, lengths, self._observation.spans, self._observation.pools))
        return {}

    def end(self, error: BaseException | None) -> None:
        self._observers.close(error)


class ScoreAudits(StepHook):
    """Audits all teachers before anything is learned from them, and again while they work."""

    def __init__(self, run: RunContext, audit: ScoreAudit) -> None:
        super().__init__(run)
        self._audit = audit

    def begin(self) -> None:
        step = self.run.first_step
        if self._audit.needs_rows:
            self._audit.take_rows(self._rows(step))
        self._audit.begin(step)
        self._report(self._audit.finish())

    def _rows(self, step: int) -> Sequence[BatchHandle]:
        """Sample short rows; of a run that samples none, take the first that it replays."""
        run = self.run
        requests = train_requests(run.config, run.inputs, step)[:AUDIT_REQUESTS]
        if run.inputs.replay is not None and not requests:
            return run.inputs.replay.read(step, generated=True)
        short = train_sampling(run.config, min(AUDIT_TOKENS, run.length_cap.at(step)))
        return run.flow.run(requests, short, scorers=lambda route: [])

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Take the answers that are ready, and audit again when it is due; waits for nothing."""
        outstanding = self._audit.outstanding
        if outstanding:
            self._report(self._audit.collect(ray.wait(outstanding, num_returns=len(outstanding), timeout=0)[0]))
        if self._audit.is_due(step):
            self._audit.begin(step)
        return {}

    def _report(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            self.run.view.say(fault.sentence)


class AlarmActions(StepHook):
    """Raises the alarms of each step, and does what each asks for: warn, shorten completions, stop the run.

    The horizon reads the same metrics, and lengthens completions.
    """

    def __init__(self, run: RunContext) -> None:
        """Check the records of a resumed run again, so that levels and the length cap are as they were."""
        super().__init__(run)
        self._alarms = Alarms(run.config.alarms)
        self._file = RecordsFile(run.directory.alarms)
        self._file.drop_from(run.first_step + 1)
        for record in RecordsFile(run.directory.metrics).read():
            if record["step"] <= run.first_step:
                self._shorten(self._alarms.check(record))
                run.length_cap.observe(record)

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        raised = self._alarms.check(metrics)
        for alarm in raised:
            self.run.view.warn(str(alarm))
            self._file.write(
                {
                    "step": alarm.step,
                    "alarm": alarm.name,
                    "figure": alarm.config.metric,
                    "value": alarm.value,
                    "limit": alarm.limit,
                    "action": alarm.config.action,
                }
            )
            if alarm.config.action == "stop" and self.run.error is None:
                self.run.error = TrainingError(f"{alarm}; the run stopped as alarms.{alarm.name}.action asks")
        self._shorten(raised)
        self.run.length_cap.observe(metrics)
        return {}

    def _shorten(self, raised: Sequence[Raised]) -> None:
        for alarm in raised:
            if alarm.config.action == "shorten":
                self.run.length_cap.lower(after_step=alarm.step)
