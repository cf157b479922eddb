"""Samples held-out prompts in the run's environment, and measures rewards and lengths."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.actors.cluster import RAY
from cluster.config.replay import replays_signals
from cluster.config.run_config import Config
from cluster.config.terms import TEACHER
from cluster.contracts.batches import BatchHandle
from cluster.contracts.files import Record, RecordsFile
from cluster.contracts.metrics import merge, report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import ragged
from cluster.contracts.wire import from_wire
from cluster.models.model_files import load_tokenizer
from cluster.run.checkpoints import is_due
from cluster.run.hooks import RunContext, StepHook
from cluster.run.inputs import Inputs, held_out_requests, held_out_sampling
from cluster.run.summary import describe_evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cluster.run.flow import Flow
    from rollout_workers.pool import RolloutPool
    from teacher_workers.pool import Route

SAMPLES_KEPT = 8  # completions per evaluation that samples.jsonl shows


@dataclass(frozen=True)
class Evaluation:
    """Holds what one model did on the held-out prompts."""

    # accuracy: the share of right completions, absent when no prompt has an answer; kl: KL(model || its teachers) per
    # token, estimated from the samples, absent when no teacher scored them.
    metrics: dict[str, float]
    samples: list[dict[str, Any]]  # a few prompts with their completions
    reward_name: str = "accuracy"  # what people read; with reward functions, the metric `accuracy` is the mean reward

    @property
    def accuracy(self) -> float | None:
        return self.metrics.get("accuracy")

    @property
    def kl(self) -> float | None:
        return self.metrics.get("kl")


@dataclass(frozen=True)
class Evaluator:
    """Samples every held-out prompt in the run's environment; every evaluation uses the same seeds."""

    config: Config
    inputs: Inputs
    tokenizer: "PreTrainedTokenizerBase"

    def evaluate_pool(self, pool: "RolloutPool") -> Evaluation:
        requests, sampling = held_out_requests(self.config, self.inputs), held_out_sampling(self.config)
        return self._describe(list(pool.generate(requests, sampling)))

    def evaluate_run(self, flow: "Flow") -> Evaluation:
        """Measure the student of a run, and how far its samples are from its teachers."""
        requests, sampling = held_out_requests(self.config, self.inputs), held_out_sampling(self.config)

        def scorers(route: str) -> "Route":
            # At another temperature the samples' log-probabilities are not those of the model itself.
            is_scored = sampling.temperature == 1 and not replays_signals(self.config)
            return [(route, ScoreRequest(TEACHER, aligned=self.config.teachers[route].is_aligned))] * is_scored

        return self._describe(flow.run(requests, sampling, scorers))

    def _describe(self, handles: Sequence[BatchHandle]) -> Evaluation:
        metrics = report(merge(handle.metrics for handle in handles))
        return Evaluation(_held_out_names(metrics), self.read_samples(handles), self.config.environment.reward_name)

    def read_samples(self, handles: Iterable[BatchHandle]) -> list[dict[str, Any]]:
        """Fetch the completions of the first few held-out prompts and decode them for people."""
        wanted = range(min(SAMPLES_KEPT, len(self.inputs.held_out_ids)) * self.config.evaluation.samples_per_prompt)
        samples = []
        for handle in handles:
            if not any(chosen in wanted for chosen in handle.trajectory_ids):
                continue
            timeout_seconds = self.config.ray.call_timeout_seconds
            batch = from_wire(RAY.get(handle.reference, timeout_seconds, "held-out completions"))
            samples += [
                self._sample(batch, row) for row, chosen in enumerate(handle.trajectory_ids) if chosen in wanted
            ]
        return sorted(samples, key=lambda sample: int(sample["trajectory_id"]))

    def _sample(self, batch: pa.RecordBatch, row: int) -> dict[str, Any]:
        completion = ragged(batch, "token_ids")[row][ragged(batch, "loss_mask")[row] != 0]
        return {
            "trajectory_id": batch["trajectory_id"][row].as_py(),
            "prompt": self.inputs.prompts.text(batch["prompt_id"][row].as_py()),
            "completion": self.tokenizer.decode(completion.tolist(), skip_special_tokens=True),
            "reward": batch["reward"][row].as_py(),
        }


class Evaluations(StepHook):
    """Evaluates the student before training, every so many steps and after the last."""

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        forget_samples(run.directory.samples, run.first_step)
        student = run.config.student
        tokenizer = load_tokenizer(student.model, student.trust_remote_code)
        self._evaluator = Evaluator(run.config, run.inputs, tokenizer)
        self.latest: dict[str, float] = {}  # held-out metrics of the last evaluation of this attempt, by their names

    def begin(self) -> None:
        if self.run.first_step == 0 and self.run.inputs.held_out_ids:
            self.run.view.say(f"held-out before training: {describe_evaluation(self._evaluate(step=0))}")

    def after_step(self, step: int, metrics: Record, batches: Sequence[BatchHandle]) -> Record:
        """Evaluate where it is due; without held-out prompts, keep the step's own KL."""
        if not self.run.inputs.held_out_ids:
            if "train/kl" in metrics:  # no row of the step had a context
                self.run.history.note_kl(metrics["train/kl"])
        elif self.run.is_over or is_due(step, self.run.config.evaluation.every_steps):
            self._evaluate(step)
            return self.latest
        return {}

    def _evaluate(self, step: int) -> Evaluation:
        evaluation = self._evaluator.evaluate_run(self.run.flow)
        write_samples(self.run.directory.samples, step, "student", evaluation.samples)
        self.run.history.note_evaluation(evaluation)
        self.latest = {f"held_out/{name}": value for name, value in evaluation.metrics.items()}
        return evaluation


def write_samples(path: Path, step: int, model: str, samples: Sequence[dict[str, Any]]) -> None:
    """Append the samples to samples.jsonl."""
    with path.open("a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, "model": model, **sample}, ensure_ascii=False) + "\n")


def forget_samples(path: Path, last_step: int) -> None:
    """Drop what a run that goes on after `last_step` samples again; one that has not trained yet begins with step 0."""
    RecordsFile(path).keep(
        lambda sample: sample["step"] <= last_step and not (last_step == 0 and sample.get("model") == "student")
    )


def _held_out_names(metrics: dict[str, float]) -> dict[str, float]:
    """Name the metrics after what they mean here: a mean reward over all held-out prompts is an accuracy."""
    renamed = {"rollout/reward": "accuracy", "teacher/sampled_kl": "kl"}
    return {
        renamed.get(name, name.removeprefix("rollout/")): value
        for name, value in metrics.items()
        if name in renamed or "rollout/" in name
    }
