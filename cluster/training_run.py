"""What happens around the loop: evaluation, checkpoints, figures for the user, the exported model."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from cluster.contracts.config import Config
from cluster.evaluation import Evaluation, evaluate, write_samples
from cluster.metric_sinks import MetricsFile, Record, TerminalView
from cluster.model_files import load_tokenizer
from cluster.pipeline import Inputs, Pipeline
from cluster.run_directory import RunDirectory
from learner.checkpoint import prune, step_folder


@dataclass
class History:
    """The figures that the last lines of a run compare; part of every checkpoint."""

    teacher_accuracy: dict[str, float | None] = field(default_factory=dict)
    first_accuracy: float | None = None
    last_accuracy: float | None = None
    first_kl: float | None = None
    last_kl: float | None = None
    first_sample: dict[str, str] = field(default_factory=dict)
    last_sample: dict[str, str] = field(default_factory=dict)


@dataclass
class TrainingRun:
    """One run's state outside the pools; the driver calls it at the start, after each step and at the end."""

    config: Config
    inputs: Inputs
    pipeline: Pipeline
    directory: RunDirectory
    view: TerminalView
    first_step: int
    history: History
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        """Open what every step writes to."""
        student = self.config.student
        self._tokenizer = load_tokenizer(student.model, student.trust_remote_code)
        self._metrics = MetricsFile(self.directory.metrics)
        self._metrics.drop_from(self.first_step + 1)

    def begin(self) -> None:
        """Measure the untrained student, unless the run is resumed or its first step is its last."""
        if self.first_step == 0:
            found = self._evaluate(0)
            if found is not None:
                self.history.first_accuracy = self.history.last_accuracy = found.accuracy
                self.history.first_sample = dict(found.samples[0]) if found.samples else {}
                self.view.say(f"held-out before training: {describe_evaluation(found)}")
        self.started = time.perf_counter()

    def finish_step(self, step: int, record: Record) -> None:
        """Record the step; evaluate and write a checkpoint where they are due."""
        record = dict(record)
        self.history.last_kl = record["train/kl"]
        if self.history.first_kl is None:
            self.history.first_kl = record["train/kl"]
        is_last = step == self.config.run.steps
        if is_last or _is_due(step, self.config.evaluation.every_steps):
            record.update(self._evaluate_student(step))
        self._metrics.write(record)
        self.view.show(record)
        if is_last or _is_due(step, self.config.checkpoint.every_steps):
            self.write_checkpoint(step)

    def write_checkpoint(self, step: int) -> Path:
        """Write the whole training state; it is complete or absent."""
        folder = step_folder(self.directory.checkpoints, step)
        self.pipeline.learner.save_checkpoint(folder, {"step": step, "history": vars(self.history)})
        prune(self.directory.checkpoints, self.config.checkpoint.keep_last)
        return folder

    def end(self) -> None:
        """Export the student and say what the run achieved."""
        seconds = time.perf_counter() - self.started
        if self.config.checkpoint.export:
            self.pipeline.learner.export(self.directory.export)
            self.view.say(f"student: {self.directory.export}")
        self.view.say(f"figures: {self.directory.metrics}")
        for line in summary(self.config, self.history, seconds, steps=self.config.run.steps - self.first_step):
            self.view.say(line)

    def _evaluate_student(self, step: int) -> dict[str, float]:
        found = self._evaluate(step)
        if found is None:
            return {}
        self.history.last_accuracy = found.accuracy
        self.history.last_sample = dict(found.samples[0]) if found.samples else {}
        figures = {name.removeprefix("rollout/"): value for name, value in found.metrics.items()}
        if found.accuracy is not None:
            figures["accuracy"] = figures.pop("reward")
        return {f"held_out/{name}": value for name, value in figures.items()}

    def _evaluate(self, step: int) -> Evaluation | None:
        if not self.inputs.held_out_ids:
            return None
        found = evaluate(self.pipeline.rollouts, self.config, self.inputs, self._tokenizer)
        write_samples(self.directory.samples, step, "student", found.samples)
        return found


def describe_evaluation(found: Evaluation) -> str:
    """Say an evaluation in half a line."""
    length = f"completion length {found.metrics['rollout/completion_length']:.1f}"
    return length if found.accuracy is None else f"accuracy {found.accuracy:.3f}, {length}"


def summary(config: Config, history: History, seconds: float, steps: int) -> list[str]:
    """Return the last lines of a run."""
    lines = [f"{steps} steps in {seconds:.0f} s"]
    if history.first_kl is not None and history.last_kl is not None:
        lines.append(f"KL to the teacher per token: {history.first_kl:.4f} -> {history.last_kl:.4f}")
    if history.first_accuracy is not None and history.last_accuracy is not None:
        teachers = "".join(
            f", teacher{'' if len(config.teachers) == 1 else ' ' + name} {accuracy:.2f}"
            for name, accuracy in history.teacher_accuracy.items()
            if accuracy is not None
        )
        student = f"student {history.first_accuracy:.2f} -> {history.last_accuracy:.2f}"
        lines.append(f"held-out accuracy: {student}{teachers}")
    elif history.first_sample and history.last_sample:
        lines.append(f"prompt: {json.dumps(history.first_sample['prompt'])}")
        lines.append(f"before: {json.dumps(history.first_sample['completion'])}")
        lines.append(f"after:  {json.dumps(history.last_sample['completion'])}")
    return lines


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0
