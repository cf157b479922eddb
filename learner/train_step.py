"""One optimizer step of one rank: forward, objective, backward over its micro-batches, then the update."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from cluster.contracts.metrics import Max, Mean, Metric, Quantile, merge
from cluster.contracts.objective import TEACHER
from learner.completion_head import Evaluation
from learner.engine import TrainEngine
from learner.micro_batch import MicroBatch
from learner.objective.objective import Objective
from learner.objective.tokens import CompletionTokens
from learner.teacher_heads import TeacherHeads

IMPORTANCE_QUANTILE = 0.99

T = TypeVar("T")


@dataclass(frozen=True)
class StepTask:
    """What all ranks have in common in one step."""

    objective: Objective
    num_tokens: int  # completion tokens of the step, over all ranks
    teacher_heads: TeacherHeads = field(default_factory=dict)


def train_step(
    engine: TrainEngine, batches: Iterable[MicroBatch], task: StepTask, learning_rate: float
) -> dict[str, Metric]:
    """Update the weights once and return what this rank saw; `metrics.merge` over ranks gives the step's figures.

    Args:
        engine: holds the weights.
        batches: this rank's micro-batches, at least one and as many as every other rank has.
        task: what to minimise, over how many tokens.
        learning_rate: of this step.
    """
    parts = accumulate(engine, batches, task)
    return {**parts, "gradient_norm": Max(engine.step(learning_rate)), "learning_rate": Max(learning_rate)}


def measure_gradient(engine: TrainEngine, batches: Iterable[MicroBatch], task: StepTask) -> dict[str, Metric]:
    """Return what `train_step` would, without changing the weights."""
    parts = accumulate(engine, batches, task)
    return {**parts, "gradient_norm": Max(engine.discard())}


def accumulate(engine: TrainEngine, batches: Iterable[MicroBatch], task: StepTask) -> dict[str, Metric]:
    """Run forward and backward over the micro-batches; the gradients stay in the engine."""
    parts: list[dict[str, Metric]] = []
    for batch, is_last in _with_last(batches):
        found = engine.forward(batch, task.objective, task.teacher_heads)
        engine.backward(found.loss / max(1, task.num_tokens), is_last)
        parts.append(describe(found, batch.tokens.to(found.loss.device), task.objective.config.support == "samples"))
    return {**merge(parts), "micro_batches": Max(len(parts))}


@torch.no_grad()
def describe(found: Evaluation, tokens: CompletionTokens, has_draws: bool) -> dict[str, Metric]:
    """Return one micro-batch's figures per completion token; none where there are no completion tokens.

    Args:
        found: the micro-batch's evaluation.
        tokens: its data.
        has_draws: whether the candidates are independent draws: one may stand there twice.
    """
    if not len(tokens):
        return {}
    age = found.logprobs - tokens.rollout_logprobs
    importance = age.exp()
    metrics: dict[str, Metric] = {
        "loss": _mean(found.losses),
        "kl": _mean(found.logprobs - tokens.logprobs[TEACHER]),  # one-sample estimate of KL(student || teacher)
        "entropy": _mean(found.entropy),
        "importance_mean": _mean(importance),
        "importance_max": Max(importance.max().item()),
        "importance_p99": Quantile.of(IMPORTANCE_QUANTILE, importance.tolist()),
        "sampler_learner_gap": _mean(age.abs()),
        "sampler_learner_gap_max": Max(age.abs().max().item()),
    }
    if tokens.candidate_ids.shape[1]:
        metrics["student_candidate_mass"] = _mean(found.candidate_mass)
        if not has_draws:
            metrics["teacher_candidate_mass"] = _mean(tokens.candidate_logprobs[TEACHER].exp().sum(-1))
    return metrics


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Say of each item whether it is the last; looks one item ahead."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _mean(values: Tensor) -> Mean:
    return Mean(values.sum(dtype=torch.float64).item(), len(values))
