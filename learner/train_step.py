"""Runs forward, objective and backward over micro-batches of one rank, and returns their metrics."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import torch
from torch import Tensor

from cluster.config.stages import LearnerConfig
from cluster.config.terms import TEACHER
from cluster.contracts.metrics import Max, Mean, Metric, Quantile, Sum, merge
from learner.batching.micro_batch import MicroBatch
from learner.engines.base import TrainEngine
from learner.kept_rows import Watch
from learner.loss.objective import Objective
from learner.loss.tokens import CompletionTokens, Evaluation
from learner.model.completion_head import TeacherHeads

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda _progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_at(step: int, num_steps: int, config: LearnerConfig) -> float:
    """Return the rate of optimizer step `step` (from 0) of `num_steps`.

    Warm-up rises linearly and reaches the peak with its last step; a decay falls from the peak to
    `min_learning_rate_ratio` of it at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decaying_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decaying_steps)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * DECAYS[config.lr_schedule](progress))


def accumulate(
    engine: TrainEngine,
    batches: Iterable[MicroBatch],
    num_batches: int,
    objective: Objective,
    teacher_heads: TeacherHeads,
    completes_step: bool,
    keep: Callable[[Watch, Evaluation], Mapping[str, Metric]] | None = None,
) -> dict[str, Metric]:
    """Run forward and backward over some of a step's micro-batches; the gradients' sums stay in the engine.

    Every rank has `num_batches` in this call, at least one; `completes_step` says that no others follow.
    `keep` receives what the watches of micro-batches have read, and returns metrics of it.
    """
    parts: list[dict[str, Metric]] = []
    for number, batch in enumerate(batches, start=1):
        started = perf_counter()
        result = engine.forward(batch, objective, teacher_heads)
        engine.backward(result.loss, completes_step and number == num_batches)
        metrics = describe(result, batch.tokens.to(result.loss.device), objective.needs.sampled_candidates)
        if objective.needs.last_states or objective.needs.layer_states:
            metrics |= {"state_error": _mean(result.columns[-1])} if len(batch.tokens) else {}
        # Only now: a GPU has just begun when `backward` returns, and reading the metrics waits for it.
        if batch.watch is not None and keep is not None:
            metrics |= keep(batch.watch, result)
        parts.append(metrics | {"busy_seconds": Sum(perf_counter() - started), "micro_batches": Sum(1.0)})
    return merge(parts)


def prefetched(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Make each micro-batch in a thread while the one before is computed, in pinned memory if it goes to a GPU.

    Two live at a time: hidden states are large.
    """
    iterator = iter(batches)

    def make() -> MicroBatch | None:
        batch = next(iterator, None)
        return batch if batch is None or device.type == "cpu" else batch.changed(Tensor.pin_memory)

    with ThreadPoolExecutor(1, thread_name_prefix="micro-batch") as thread:
        coming = thread.submit(make)
        while (batch := coming.result()) is not None:
            coming = thread.submit(make)
            yield batch


@torch.no_grad()
def describe(result: Evaluation, tokens: CompletionTokens, sampled_candidates: bool) -> dict[str, Metric]:
    """Return one micro-batch's metrics per completion token; none where there are no completion tokens.

    Those of a privileged sampler's tokens stand apart: how far they are from the student says nothing of its age.
    `sampled_candidates`: whether the candidates are independent draws, one of which may stand there twice.
    """
    if not len(tokens):
        return {}
    metrics: dict[str, Metric] = {"loss": _mean(result.losses)}
    if tokens.privileged.any():
        metrics["privileged_logprob"] = _mean(result.logprobs[tokens.privileged])
        own = ~tokens.privileged
        result, tokens = result.take(own), tokens[own]
    return metrics | _of_own_tokens(result, tokens, sampled_candidates) if len(tokens) else metrics


def _of_own_tokens(result: Evaluation, tokens: CompletionTokens, sampled_candidates: bool) -> dict[str, Metric]:
    """Return the metrics of tokens that the student sampled from its own prompt, at least one."""
    age = result.sampler_logprobs - tokens.rollout_logprobs  # both at the sampling temperature
    importance = age.exp()
    metrics: dict[str, Metric] = {
        "kl": _mean(result.logprobs - tokens.logprobs[TEACHER]),  # one-sample estimate of KL(student || teacher)
        "entropy": _mean(result.entropy),
        "importance_mean": _mean(importance),
        "importance_max": Max(importance.max().item()),
        "importance_p99": Quantile.of(0.99, importance.tolist()),
        "sampler_learner_gap": _mean(age.abs()),
        "sampler_learner_gap_max": Max(age.abs().max().item()),
    }
    if tokens.candidate_ids.shape[1]:
        metrics["student_candidate_mass"] = _mean(result.candidate_mass)
        if not sampled_candidates:
            metrics["teacher_candidate_mass"] = _mean(tokens.candidate_logprobs[TEACHER].exp().sum(-1))
    return metrics


def _mean(values: Tensor) -> Mean:
    return Mean(values.sum(dtype=torch.float64).item(), len(values))
