"""Sums up what a run achieved, in the last lines that it prints."""

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.config.run_config import Config
from cluster.run.hooks import RunContext, StepHook
from cluster.run.model_readme import add_readme

if TYPE_CHECKING:
    from cluster.run.evaluation import Evaluation

SHOWN_CHARACTERS = 240  # of a sample


@dataclass
class RunSummary:
    """Keeps the first and the latest evaluation of a run; part of every checkpoint."""

    teacher_accuracy: dict[str, float | None] = field(default_factory=dict)
    first_accuracy: float | None = None
    last_accuracy: float | None = None
    first_kl: float | None = None  # on held-out prompts where there are any, else on the step's own
    last_kl: float | None = None
    first_sample: dict[str, Any] = field(default_factory=dict)
    last_sample: dict[str, Any] = field(default_factory=dict)

    def note_evaluation(self, evaluation: "Evaluation") -> None:
        sample = evaluation.samples[0] if evaluation.samples else {}
        if not self.first_sample:
            self.first_accuracy, self.first_sample = evaluation.accuracy, sample
        self.last_accuracy, self.last_sample = evaluation.accuracy, sample
        if evaluation.kl is not None:
            self.note_kl(evaluation.kl)

    def note_kl(self, kl: float) -> None:
        self.first_kl = kl if self.first_kl is None else self.first_kl
        self.last_kl = kl


class RunResult(StepHook):
    """Exports the student when all steps are done, and says what the run achieved."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self._began = time.perf_counter()

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self, error: BaseException | None) -> None:
        if error is not None:
            return
        run, seconds = self.run, time.perf_counter() - self._began
        run.view.finish()
        if run.config.checkpoint.export:
            run.pipeline.learner.export(run.directory.export)
            add_readme(run.directory.export, run.directory, run.config, run.config.run.steps, run.view.say)
            run.view.say(f"student: {run.directory.export}")
        run.view.say(f"metrics: {run.directory.metrics}")
        for line in summary(run.config, run.history, seconds, steps=run.config.run.steps - run.first_step):
            run.view.say(line)


def describe_evaluation(evaluation: "Evaluation") -> str:
    """Say an evaluation in half a line."""
    parts = [f"completion length {evaluation.metrics['completion_length']:.1f}"]
    if evaluation.kl is not None:
        parts.insert(0, f"KL per token {evaluation.kl:.4f}")
    if evaluation.accuracy is not None:
        parts.insert(0, f"{evaluation.reward_name} {evaluation.accuracy:.3f}")
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
        lines.append(f"held-out {config.environment.reward_name}: {student}{teachers}")
    return lines


def _quote(text: str) -> str:
    """Put a text on one line, shortened to what a terminal shows."""
    return json.dumps(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...", ensure_ascii=False)
