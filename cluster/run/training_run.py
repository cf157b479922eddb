"""What happens around the loop: evaluation, checkpoints, figures for the user, the exported model."""

import json
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import ray

from cluster.config.run_config import Config
from cluster.config.run_directory import RunDirectory
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import CheckpointError, PreceptorError, RunStopped, TrainingError
from cluster.contracts.files import Record, RecordsFile
from cluster.contracts.requests import SamplingSettings
from cluster.elastic.balancer import MOVES, make_balancer
from cluster.elastic.replace_teacher import RunParts, TeacherChanges
from cluster.elastic.scale import Progress, make_scaling
from cluster.models.model_files import load_tokenizer
from cluster.monitoring.alarms import Alarms, LengthCap, Raised
from cluster.monitoring.sinks import TerminalView
from cluster.nodes.interruption import StopRequest
from cluster.run.checkpoints import Checkpoints, RunState, RunSummary
from cluster.run.evaluation import Evaluation, Evaluator, forget_samples, write_samples
from cluster.run.flow import Flow
from cluster.run.inputs import Inputs, train_requests, train_sampling
from cluster.run.ledger import Ledger
from cluster.run.observation import StepObservation, open_observers
from cluster.run.pools import Pipeline
from learner.checkpointing.checkpoint import tidy
from teacher_workers.audit.checks import Fault
from teacher_workers.audit.runner import ScoreAudit

AUDIT_REQUESTS = 16  # completions of which the rows for the audits of scores are chosen
AUDIT_TOKENS = 64  # of each; an audit looks at short rows only
SHOWN_CHARACTERS = 240  # of a sample, in the last lines of a run


@dataclass
class TrainingRun:
    """One run's state outside the pools; the driver calls it at the start, after each step and at the end."""

    config: Config
    inputs: Inputs
    pipeline: Pipeline
    directory: RunDirectory
    view: TerminalView
    first_step: int
    history: RunSummary
    stop: StopRequest = field(default_factory=StopRequest)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Open what every step writes to."""
        student = self.config.student
        tokenizer = load_tokenizer(student.model, student.trust_remote_code)
        self._evaluator = Evaluator(self.config, self.inputs, tokenizer)
        self._metrics = RecordsFile(self.directory.metrics)
        self._finished_step = self._saved_step = self.first_step
        self._alarms_file = RecordsFile(self.directory.alarms)
        for file in (self._metrics, self._alarms_file, RecordsFile(self.directory.moves)):
            file.drop_from(self.first_step + 1)
        forget_samples(self.directory.samples, self.first_step)
        tidy(self.directory.checkpoints, self.first_step)
        self.ledger = Ledger(self.directory.ledger, self.first_step)
        self._checkpoints = Checkpoints(self.directory, self.config.checkpoint, self.pipeline.learner)
        parts = RunParts(self.config, self.inputs, self.pipeline)
        self._changes = TeacherChanges(parts, self.directory, self.first_step, self.view.say)
        self._audit = ScoreAudit(self._changes.config, self.pipeline.teachers.pools, self.directory.score_audit)
        progress = Progress(lambda: self._finished_step, self.view.say)
        self._scaling = make_scaling(self.config, self.inputs, self.pipeline, self.directory, progress)
        self._balancer = make_balancer(self.config, self.pipeline, self.directory, self.view.say)
        self._alarms = Alarms(self.config.alarms)
        self.observers = open_observers(self.config, self.directory, self.first_step)
        self._observation = StepObservation(self.pipeline, self.observers)
        rollout = self.config.rollout
        self._cap = LengthCap(rollout.max_completion_tokens, rollout.max_staleness)
        for record in self._metrics.read():  # of a resumed run
            self._shorten(self._alarms.check(record))

    def restore_pools(self) -> None:
        """Give the pools, which have just started, the sizes that were last asked for in a run that is resumed."""
        self._scaling.restore()

    def begin(self, flow: Flow) -> None:
        """Measure the untrained student, unless the run is resumed; `flow` serves this and all later evaluations."""
        self._flow = flow
        if self.first_step == 0 and self.inputs.held_out_ids:
            found = self._evaluate(step=0)
            self.view.say(f"held-out before training: {describe_evaluation(found)}")
        self._audit_first(flow)
        self._observation.begin(flow)
        self.started = time.perf_counter()

    def poll(self) -> None:
        """See whether somebody asks for other sizes of pools or another teacher; most calls return at once."""
        self._scaling.poll()
        self._changes.poll()

    def enter(self, step: int) -> None:
        """Settle who scores a step, from 0, that is about to be asked for."""
        self._changes.enter(step, self._audit)
        # A teacher that takes another's place can start when that one has left, and this step's scores wait for it.
        self.pipeline.teachers.close(next_step=self._finished_step)

    def sampling(self, step: int) -> SamplingSettings:
        """Return how the completions of a step, from 0, are drawn."""
        return replace(train_sampling(self.config), max_completion_tokens=self._cap.at(step))

    def finish_step(self, step: int, record: Record, batches: Iterable[BatchHandle] = ()) -> None:
        """Record the step, which learned from `batches`; evaluate, begin and complete checkpoints where they are due.

        Raises:
            CheckpointError: a checkpoint cannot be written; those before it stay.
            TrainingError: an alarm went off that is to stop the run; a checkpoint of the step is written.
            RunStopped: somebody asked for it; a checkpoint of the step is written.
        """
        self.ledger.close(step)
        self.pipeline.teachers.close(next_step=step)
        self._finished_step = step
        record = {**record, **self._observation.observe(), **self._checkpoints.complete_if_written()}
        is_last = step == self.config.run.steps
        if self._balancer is not None and not is_last:
            self._balancer.after_step(record, list(batches), self.config.run.steps - step)
        record |= {MOVES: 0.0 if self._balancer is None else float(self._balancer.num_moves)}
        if not self.inputs.held_out_ids:
            self.history.note_kl(record["train/kl"])
        elif is_last or _is_due(step, self.config.evaluation.every_steps):
            record |= {f"held_out/{name}": value for name, value in self._evaluate(step).metrics.items()}
        self._metrics.write(record)
        self.view.show(record)
        self._observation.report(record, batches)
        self._go_on_auditing(step)
        raised = self._alarms.check(record)
        stopping = [alarm for alarm in raised if alarm.config.action == "stop"]
        asked = self.stop.is_asked and not is_last
        if is_last or stopping or asked or _is_due(step, self.config.checkpoint.every_steps):
            self._begin_checkpoint(step)
        self._report(raised)
        self._shorten(raised)
        if is_last or stopping or asked:
            self._checkpoints.complete()
        if stopping:
            raise TrainingError(f"{stopping[0]}; the run stopped as alarms.{stopping[0].name}.action asks")
        if asked:
            raise RunStopped(f"stopped after step {step}; go on with preceptor train --resume {self.directory.path}")

    def save_after(self, error: PreceptorError) -> None:
        """Leave a checkpoint of the last finished step, as far as that is possible, when `error` ends the run."""
        if isinstance(error, CheckpointError):
            return
        with suppress(PreceptorError):  # the error that ends the run is the one to report
            if self._finished_step > self._saved_step:
                self._begin_checkpoint(self._finished_step)
            self._checkpoints.complete()

    def end(self) -> None:
        """Export the student and say what the run achieved."""
        self.view.finish()
        seconds = time.perf_counter() - self.started
        if self.config.checkpoint.export:
            self.pipeline.learner.export(self.directory.export)
            self.view.say(f"student: {self.directory.export}")
        self.view.say(f"figures: {self.directory.metrics}")
        for line in summary(self.config, self.history, seconds, steps=self.config.run.steps - self.first_step):
            self.view.say(line)

    def _audit_first(self, flow: Flow) -> None:
        """Audit all teachers before anything is learned from them."""
        if self._audit.needs_rows:
            requests = train_requests(self.config, self.inputs, self.first_step)[:AUDIT_REQUESTS]
            sampling = self.sampling(self.first_step)
            short = replace(sampling, max_completion_tokens=min(AUDIT_TOKENS, sampling.max_completion_tokens))
            self._audit.take_rows(flow.run(requests, short, scorers=lambda route: []))
        self._audit.begin(self.first_step)
        self._report_faults(self._audit.finish())

    def _go_on_auditing(self, step: int) -> None:
        """Take the answers that are there, and ask again when it is time; waits for nothing."""
        asked = self._audit.outstanding
        if asked:
            self._report_faults(self._audit.collect(ray.wait(asked, num_returns=len(asked), timeout=0)[0]))
        if self._audit.is_due(step):
            self._audit.begin(step)

    def _report_faults(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            self.view.say(fault.sentence)

    def _begin_checkpoint(self, step: int) -> None:
        self._saved_step = step
        self._metrics.sync()  # a resumed run reads it again
        self._checkpoints.begin(RunState(step, self.history, self.ledger.state()))

    def _report(self, raised: Sequence[Raised]) -> None:
        for alarm in raised:
            self.view.say(str(alarm))
            self._alarms_file.write(
                {
                    "step": alarm.step,
                    "alarm": alarm.name,
                    "figure": alarm.config.metric,
                    "value": alarm.value,
                    "limit": alarm.limit,
                    "action": alarm.config.action,
                }
            )

    def _shorten(self, raised: Sequence[Raised]) -> None:
        for alarm in raised:
            if alarm.config.action == "shorten":
                self._cap.lower(after_step=alarm.step)

    def _evaluate(self, step: int) -> Evaluation:
        found = self._evaluator.evaluate_run(self._flow)
        write_samples(self.directory.samples, step, "student", found.samples)
        self.history.note_evaluation(found)
        return found


def describe_evaluation(found: Evaluation) -> str:
    """Say an evaluation in half a line."""
    parts = [f"completion length {found.metrics['completion_length']:.1f}"]
    if found.kl is not None:
        parts.insert(0, f"KL per token {found.kl:.4f}")
    if found.accuracy is not None:
        parts.insert(0, f"accuracy {found.accuracy:.3f}")
    return ", ".join(parts)


def summary(config: Config, history: RunSummary, seconds: float, steps: int) -> list[str]:
    """Return the last lines of a run."""
    lines = []
    if history.first_sample and history.last_sample:
        lines.append(f"prompt: {_quote(history.first_sample['prompt'])}")
        lines.append(f"before: {_quote(history.first_sample['completion'])}")
        lines.append(f"after:  {_quote(history.last_sample['completion'])}")
    lines.append(f"{steps} steps in {seconds:.0f} s")
    if history.first_kl is not None and history.last_kl is not None:
        lines.append(f"KL to the teacher per token: {history.first_kl:.4f} -> {history.last_kl:.4f}")
    if history.first_accuracy is not None and history.last_accuracy is not None:
        teachers = "".join(
            f", teacher{'' if len(config.routes) == 1 else ' ' + name} {accuracy:.2f}"
            for name, accuracy in history.teacher_accuracy.items()
            if accuracy is not None
        )
        student = f"student {history.first_accuracy:.2f} -> {history.last_accuracy:.2f}"
        lines.append(f"held-out accuracy: {student}{teachers}")
    return lines


def _quote(text: str) -> str:
    """Put a text on one line, shortened to what a terminal shows."""
    return json.dumps(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...", ensure_ascii=False)


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
