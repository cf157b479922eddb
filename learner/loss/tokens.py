"""Holds what an objective reads of completion tokens, and what it makes of them.

All tensors of one object are on one device and cover the same n completion tokens in the same order; log-probabilities
are float32 natural logarithms at temperature 1, except those of the rollout worker, which are under its sampling
distribution.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompletionTokens:
    """Holds the data of n completion tokens of one micro-batch: everything but the student."""

    target_ids: Tensor  # [n] int64: the sampled tokens
    rollout_logprobs: Tensor  # [n]
    candidate_ids: Tensor  # [n, k] int64; k is 0 where the support lists no candidates
    candidate_rollout_logprobs: Tensor  # [n, k], or [n, 0] where the student did not choose the candidates
    scores: Mapping[str, Mapping[str, Tensor]]  # model -> signal -> [n] or [n, k]; what contracts/signals.py lists
    trajectory: Tensor  # [n] int64: which trajectory of the micro-batch, from 0; equal values stand together
    position: Tensor  # [n] int64: place in the trajectory's completion tokens, from 0
    length: Tensor  # [n] int64: completion tokens of the trajectory
    uniform: Tensor  # [n] in [0, 1): random, and the same whenever this token of this trajectory is seen
    task_advantage: Tensor  # [n]: of the trajectory's reward within its group; 0 without a reward
    reward: Tensor  # [n]: the trajectory's; NaN without one
    weight: Tensor  # [n]: of the trajectory, in every term
    # [n] int64: the episode's turn, from 0; [0]: all tokens are of the first
    turn: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    # [n] whether another sampler than the student wrote the trajectory; [0]: the student wrote all
    privileged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.target_ids)

    def __getitem__(self, chosen: slice | Tensor) -> "CompletionTokens":
        return CompletionTokens(**_take(vars(self), chosen))

    @property
    def logprobs(self) -> Mapping[str, Tensor]:
        """Return each model's log-probabilities of the sampled tokens, [n]."""
        return self.signal("logprobs")

    @property
    def candidate_logprobs(self) -> Mapping[str, Tensor]:
        """Return each model's log-probabilities of the candidates, [n, k]; empty where there are no candidates."""
        return self.signal("candidate_logprobs")

    @property
    def teacher_entropy(self) -> Tensor:
        """Return the teacher's entropy, [n]; [0] where the objective does not need it."""
        return self.signal("entropy").get("teacher", self.rollout_logprobs[:0])

    def written_by(self, rows: str) -> Tensor:
        """Return whether each token is of such `rows` as a term names, [n]."""
        if rows == "all" or not len(self.privileged):
            return torch.full_like(self.target_ids, rows != "privileged", dtype=torch.bool)
        return self.privileged if rows == "privileged" else ~self.privileged

    @property
    def shared(self) -> Tensor | None:
        """Return which candidates are tokens of all models, [n, k]; None: all are."""
        columns = list(self.signal("shared").values())
        return torch.stack(columns).bool().all(0) if columns else None

    def signal(self, name: str) -> Mapping[str, Tensor]:
        """Return one signal of every model that sent it."""
        return {model: signals[name] for model, signals in self.scores.items() if name in signals}

    def to(self, device: torch.device) -> "CompletionTokens":
        return CompletionTokens(**map_tensors(vars(self), lambda values: values.to(device)))


@dataclass(frozen=True)
class TokenPlan:
    """Holds what an objective has derived from whole trajectories for n completion tokens; without gradient."""

    weights: Tensor  # [n] how much each token counts in every term
    # Term -> [n] what is added to a token's advantage: discounted ones of later tokens, or minus the step's mean
    added_advantages: Mapping[str, Tensor]
    trusted_trajectory: Mapping[str, Tensor]  # term -> [n] whether the trajectory's importance ratio is within bounds
    normaliser: Tensor  # [n] of the student at the sampling temperature (`temperature_normaliser`); `evaluate` knows it

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, chosen: slice | Tensor) -> "TokenPlan":
        return TokenPlan(**_take(vars(self), chosen))


@dataclass(frozen=True)
class Evaluation:
    """Holds what came of n completion tokens, in float32 and without a gradient, but for the loss of a micro-batch."""

    loss: Tensor  # scalar: the sum of the losses; the step's, divided by its completion tokens, is minimised
    losses: Tensor  # [n]; 0 where nothing is minimised
    logprobs: Tensor  # [n] of the sampled tokens under the current student
    entropy: Tensor  # [n] of the current student over the whole vocabulary, in nats
    candidate_mass: Tensor  # [n] the student's probability of all candidates together; 0 where there are none
    at_sampling_temperature: Tensor | None = None  # [n] as logprobs; None: that temperature is 1
    state_errors: Tensor | None = None  # [n] distance from the target over its length; None: of no states
    logits_gradient: Tensor | None = None  # of a chunk: [n, vocabulary], of the loss by the student's logits

    @property
    def sampler_logprobs(self) -> Tensor:
        """Return the current student's log-probabilities of the sampled tokens at the sampling temperature, [n]."""
        return self.logprobs if self.at_sampling_temperature is None else self.at_sampling_temperature

    def take(self, chosen: Tensor) -> "Evaluation":
        """Return what came of some of the tokens; the loss stays that of all."""
        return replace(self, **{name: value[chosen] for name, value in vars(self).items() if _is_column(value)})

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Return what is known of each token, in the order of the fields."""
        errors = torch.zeros_like(self.losses) if self.state_errors is None else self.state_errors
        return self.losses, self.logprobs, self.entropy, self.candidate_mass, self.sampler_logprobs, errors


def map_tensors(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a tensor, or every one in mappings of mappings."""
    if isinstance(values, Tensor):
        return change(values)
    return {name: map_tensors(value, change) for name, value in values.items()}


def _is_column(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _take(columns: Mapping[str, Any], chosen: slice | Tensor) -> Any:
    return map_tensors(columns, lambda values: values[chosen] if len(values) else values)
