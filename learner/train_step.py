"""One optimizer step of one rank: forward, objective, backward over its micro-batches, then the update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cluster.contracts.config import ObjectiveConfig
from cluster.contracts.metrics import Max, Mean, Metric, Quantile, merge
from learner.engine import TrainEngine
from learner.losses import TOPK_DIVERGENCES, sampled_reverse_kl
from learner.micro_batch import MicroBatch
from learner.model import StudentScores

IMPORTANCE_QUANTILE = 0.99


def train_step(
    engine: TrainEngine,
    batches: Sequence[MicroBatch],
    objective: ObjectiveConfig,
    num_tokens: int,
    learning_rate: float,
) -> dict[str, Metric]:
    """Update the weights once and return what this rank saw; `metrics.merge` over ranks gives the step's figures.

    Args:
        engine: holds the weights.
        batches: this rank's micro-batches, as many as every other rank has.
        objective: what to minimise.
        num_tokens: completion tokens of the step, over all ranks.
        learning_rate: of this step.
    """
    parts = accumulate(engine, batches, objective, num_tokens)
    gradient_norm = engine.step(learning_rate)
    step_metrics: dict[str, Metric] = {
        "gradient_norm": Max(gradient_norm),
        "learning_rate": Max(learning_rate),
        "micro_batches": Max(len(batches)),
    }
    return {**parts, **step_metrics}


def measure_gradient(
    engine: TrainEngine, batches: Sequence[MicroBatch], objective: ObjectiveConfig, num_tokens: int
) -> dict[str, Metric]:
    """Return what `train_step` would, without changing the weights."""
    parts = accumulate(engine, batches, objective, num_tokens)
    return {**parts, "gradient_norm": Max(engine.discard())}


def accumulate(
    engine: TrainEngine, batches: Sequence[MicroBatch], objective: ObjectiveConfig, num_tokens: int
) -> dict[str, Metric]:
    """Run forward and backward over the micro-batches; the gradients stay in the engine."""
    parts = []
    for position, batch in enumerate(batches, start=1):
        scores = engine.forward(batch)
        batch = batch.to(scores.logprobs.device)
        loss = objective_loss(objective, scores, batch, num_tokens)
        engine.backward(loss, is_last=position == len(batches))
        parts.append(describe(scores, batch, loss.item() * max(1, num_tokens)))
    return merge(parts)


def objective_loss(objective: ObjectiveConfig, scores: StudentScores, batch: MicroBatch, num_tokens: int) -> Tensor:
    """Return this micro-batch's part of the step's loss."""
    if objective.divergence == "sampled_reverse_kl":
        return sampled_reverse_kl(scores.logprobs, batch.rollout_logprobs, batch.teacher_logprobs, num_tokens)
    divergence = TOPK_DIVERGENCES[objective.divergence]
    return divergence(scores.topk_logprobs, batch.teacher_topk_logprobs, num_tokens, objective.beta)


@torch.no_grad()
def describe(scores: StudentScores, batch: MicroBatch, loss_sum: float) -> dict[str, Metric]:
    """Return one micro-batch's figures per completion token; none where there are no completion tokens."""
    tokens = batch.num_completion_tokens
    if not tokens:
        return {}
    age = scores.logprobs - batch.rollout_logprobs
    importance = age.exp()
    metrics: dict[str, Metric] = {
        "loss": Mean(loss_sum, tokens),
        "kl": _mean(scores.logprobs - batch.teacher_logprobs),  # one-sample estimate of KL(student || teacher)
        "entropy": _mean(scores.entropy),
        "importance_mean": _mean(importance),
        "importance_max": Max(importance.max().item()),
        "importance_p99": Quantile.of(IMPORTANCE_QUANTILE, importance.tolist()),
        "sampler_learner_gap": _mean(age.abs()),
        "sampler_learner_gap_max": Max(age.abs().max().item()),
    }
    if batch.teacher_topk_ids.shape[1]:
        metrics["teacher_topk_mass"] = _mean(batch.teacher_topk_logprobs.exp().sum(-1))
        metrics["student_topk_mass"] = _mean(scores.topk_logprobs.exp().sum(-1))
    return metrics


def _mean(values: Tensor) -> Mean:
    return Mean(values.sum(dtype=torch.float64).item(), len(values))
