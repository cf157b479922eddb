"""Builds completion tokens from whole distributions, and evaluates an objective on them in one go."""

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from cluster.contracts.objective import ObjectiveConfig
from cluster.contracts.presets import expand_preset
from learner.objective.objective import Objective
from learner.objective.softmax import student_facts
from learner.objective.tokens import CompletionTokens, StudentFacts, TokenResults


def make_objective(preset: str | None = None, **fields: Any) -> Objective:
    """Configure an objective as a run file's table would: from a preset, or from fields alone."""
    table = expand_preset(fields | {"preset": preset}) if preset else fields
    return Objective(msgspec.convert(table, ObjectiveConfig))


def random_logprobs(*shape: int, seed: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random distributions over the last dimension."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).log_softmax(-1).to(dtype)


def make_tokens(
    target_ids: Tensor,
    models: Mapping[str, Tensor],  # model -> [n, vocabulary] log-probabilities
    rollout: Tensor | None = None,  # [n, vocabulary]; None: the teacher's
    candidate_ids: Tensor | None = None,  # [n, k]
    student_chose: bool = False,
    lengths: list[int] | None = None,  # of the trajectories; None: one
    **columns: Any,
) -> CompletionTokens:
    """Gather every column from the given distributions; `columns` replaces what is said by name."""
    n, dtype = len(target_ids), models["teacher"].dtype
    rollout = models["teacher"] if rollout is None else rollout
    ids = torch.zeros(n, 0, dtype=torch.long) if candidate_ids is None else candidate_ids
    counts = torch.tensor([n] if lengths is None else lengths, dtype=torch.long)
    trajectory = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = counts.cumsum(0) - counts  # place of each trajectory's first token
    made: dict[str, Any] = {
        "target_ids": target_ids,
        "rollout_logprobs": written(rollout, target_ids),
        "candidate_ids": ids,
        "candidate_rollout_logprobs": rollout.gather(-1, ids) if student_chose else rollout[:, :0],
        "logprobs": {model: written(values, target_ids) for model, values in models.items()},
        "candidate_logprobs": {model: values.gather(-1, ids) for model, values in models.items()},
        "teacher_entropy": entropy(models["teacher"]),
        "trajectory": trajectory,
        "position": torch.arange(n) - first[trajectory],
        "length": counts[trajectory],
        "uniform": torch.full((n,), 0.5, dtype=dtype),
        "task_advantage": torch.zeros(n, dtype=dtype),
    }
    return CompletionTokens(**(made | columns))


def evaluate(
    objective: Objective, logits: Tensor, tokens: CompletionTokens, models: Mapping[str, Tensor] | None = None
) -> TokenResults:
    """Plan and evaluate all tokens at once, on copies of the logits."""
    models = {} if objective.config.support != "full" else (models or {})
    plan = objective.plan(tokens, first_pass(logits, tokens) if objective.needs_first_pass else None)
    copies = {model: values.clone() for model, values in models.items()}
    return objective.evaluate(logits.clone(), tokens, plan, copies, with_gradient=True)


def first_pass(logits: Tensor, tokens: CompletionTokens) -> StudentFacts:
    """Return what the student says of the written tokens."""
    return student_facts(logits.clone(), tokens.target_ids)


def gradient_of(results: TokenResults) -> Tensor:
    """Return the gradient, which must be there."""
    assert results.logits_gradient is not None
    return results.logits_gradient


def written(logprobs: Tensor, target_ids: Tensor) -> Tensor:
    """Return the log-probabilities of the written tokens."""
    return logprobs.gather(-1, target_ids[:, None])[:, 0]


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of each row."""
    return -(logprobs.exp() * logprobs).sum(-1)
