"""Builds completion tokens from whole distributions, and evaluates an objective on them in one go."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.presets import PRESETS, expand_preset
from learner.loss.divergences import DIVERGENCES
from learner.loss.objective import Objective
from learner.loss.softmax import read_tokens
from learner.loss.tokens import CompletionTokens, Evaluation

VOCABULARY = 40
LENGTHS = [7, 1, 4]
TOKENS = sum(LENGTHS)
MODELS = ("teacher", "base", "initial_student")


def make_objective(preset: str | None = None, temperature: float = 1.0, step: int = 0, **fields: Any) -> Objective:
    """Configure an objective as a run file's table would, at a step: from a preset, or from fields alone."""
    table = expand_preset(fields | {"preset": preset}) if preset else fields
    return Objective(msgspec.convert(table, ObjectiveConfig).at(step), temperature=temperature)


def divergence(name: str, student: Tensor, target: Tensor, parameter: float = 0.0) -> Tensor:
    """Return a divergence of the table between buckets, [tokens]."""
    return DIVERGENCES[name].losses(student, target, parameter)


forward_kl, reverse_kl, jsd = (partial(divergence, name) for name in ("forward_kl", "reverse_kl", "jsd"))
skewed_forward_kl, skewed_reverse_kl = (
    partial(divergence, name) for name in ("skewed_forward_kl", "skewed_reverse_kl")
)
BUCKET_DIVERGENCES = {name: partial(divergence, name) for name in DIVERGENCES}


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
        "scores": {
            model: {
                "logprobs": written(values, target_ids),
                "candidate_logprobs": values.gather(-1, ids),
                "entropy": entropy(values),
            }
            for model, values in models.items()
        },
        "trajectory": trajectory,
        "position": torch.arange(n) - first[trajectory],
        "length": counts[trajectory],
        "uniform": torch.full((n,), 0.5, dtype=dtype),
        "task_advantage": torch.zeros(n, dtype=dtype),
        "reward": torch.full((n,), torch.nan, dtype=dtype),
        "weight": torch.ones(n, dtype=dtype),
    }
    for model, values in columns.pop("logprobs", {}).items():
        made["scores"][model]["logprobs"] = values
    return CompletionTokens(**(made | columns))


def with_scores(tokens: CompletionTokens, **signals: Mapping[str, Tensor]) -> CompletionTokens:
    """Replace signals of some models: signal=model -> values."""
    scores = {
        model: {**said, **{name: values[model] for name, values in signals.items() if model in values}}
        for model, said in tokens.scores.items()
    }
    return replace(tokens, scores=scores)


def evaluate(
    objective: Objective, logits: Tensor, tokens: CompletionTokens, models: Mapping[str, Tensor] | None = None
) -> Evaluation:
    """Plan and evaluate all tokens at once, on copies of the logits."""
    models = {} if not objective.needs.hidden else (models or {})
    facts = first_pass(logits, tokens, objective.temperature) if objective.needs.first_pass else None
    plan = objective.plan(tokens, facts)
    copies = {model: values.clone() for model, values in models.items()}
    return objective.evaluate(logits.clone(), tokens, plan, copies, with_gradient=True)


def first_pass(logits: Tensor, tokens: CompletionTokens, temperature: float = 1.0) -> Evaluation:
    """Return what the student says of the written tokens."""
    logprobs, entropies = read_tokens(logits.clone(), tokens.target_ids)
    nothing = torch.zeros_like(logprobs)
    at_sampling = written((logits / temperature).log_softmax(-1), tokens.target_ids)
    return Evaluation(nothing.sum(), nothing, logprobs, entropies, nothing, at_sampling)


def gradient_of(results: Evaluation) -> Tensor:
    """Return the gradient, which must be there."""
    assert results.logits_gradient is not None
    return results.logits_gradient


def written(logprobs: Tensor, target_ids: Tensor) -> Tensor:
    """Return the log-probabilities of the written tokens."""
    return logprobs.gather(-1, target_ids[:, None])[:, 0]


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of each row."""
    return -(logprobs.exp() * logprobs).sum(-1)


def small(preset: str, temperature: float = 1.0, size: int = 6, step: int = 0) -> Objective:
    """Return the preset with a support that is smaller than the vocabulary of these tests."""
    sized = {} if PRESETS[preset]["support"] in ("sampled", "full") else {"support_size": size}
    return make_objective(preset, temperature, step, **sized)


def tokens_of(
    objective: Objective, models: dict[str, Tensor], rollout: Tensor | None = None, **columns: Tensor
) -> CompletionTokens:
    """Draw written tokens and candidates as the objective's support has them."""
    rollout = models["teacher"] if rollout is None else rollout
    n, generator = len(rollout), torch.Generator().manual_seed(0)
    num_candidates = objective.needs.num_candidates
    candidate_ids = torch.zeros(n, 0, dtype=torch.long)
    if objective.needs.sampled_candidates:
        candidate_ids = torch.multinomial(rollout.exp(), num_candidates, replacement=True, generator=generator)
    elif num_candidates:
        chooser = rollout if objective.needs.candidates_from == "student" else models["teacher"]
        candidate_ids = chooser.topk(num_candidates).indices
    target_ids = torch.multinomial(rollout.exp(), 1, generator=generator)[:, 0] if n else torch.zeros(0).long()
    student_chose = objective.needs.candidates_from == "student"
    lengths = LENGTHS if n == TOKENS else [n] if n else []
    return make_tokens(target_ids, models, rollout, candidate_ids, student_chose, lengths, **columns)


def random_case(preset: str, dtype: torch.dtype = torch.float64) -> tuple[Objective, Tensor, CompletionTokens, Any]:
    """Return an objective, a student, tokens that an older student wrote, and the models' logits."""
    objective = small(preset)
    models = {name: random_logprobs(TOKENS, VOCABULARY, seed=seed, dtype=dtype) for seed, name in enumerate(MODELS)}
    logits = models["teacher"] + random_logprobs(TOKENS, VOCABULARY, seed=5, scale=0.5, dtype=dtype)
    rollout = logits.log_softmax(-1) + random_logprobs(TOKENS, VOCABULARY, seed=6, scale=0.1, dtype=dtype)
    tokens = tokens_of(
        objective,
        models,
        rollout.log_softmax(-1),
        task_advantage=torch.linspace(-1, 1, TOKENS, dtype=dtype),
        uniform=torch.linspace(0, 0.99, TOKENS, dtype=dtype),
    )
    return objective, logits, tokens, models
