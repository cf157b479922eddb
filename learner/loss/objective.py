"""Computes what a run's objective makes of logits: the sum of its terms, with the gradient by the logits."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from cluster.config.terms import TEACHER
from cluster.contracts.metrics import Mean
from learner.loss.evaluators import evaluate_full, evaluate_fused, evaluate_listed, takes_fused
from learner.loss.kernels.interface import RowKernels
from learner.loss.representation import Alignment, RepresentationLoss, Scores, align
from learner.loss.softmax import at_least_float32, temperature_normaliser
from learner.loss.targets import log_linear
from learner.loss.term import Chunk
from learner.loss.terms import TERMS
from learner.loss.token_weights import (
    entropy_weights,
    is_early,
    position_importance,
    turn_weights,
    weighted_mean_of_trajectory,
)
from learner.loss.tokens import CompletionTokens, Evaluation, TokenPlan


class Objective:
    """Minimises what a configuration says: `plan` reads whole trajectories, `evaluate` any of their tokens.

    `kernels` are used where they take the logits; None: plain torch everywhere. `temperature` is that of the sampler.
    Scheduled weights are those of step 0; pass `config.at(step)` for another. Sampled `ignored_ids` have weight 0.
    `step_means` are what `advantage_sums` of all of a step's tokens come to, if `needs.step_means`.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        kernels: RowKernels | None = None,
        temperature: float = 1.0,
        ignored_ids: Collection[int] = (),
        step_means: Mapping[str, float] | None = None,
    ) -> None:
        self.needs, self.kernels, self.temperature = config.needs, kernels, temperature
        self._step_means = {name: mean if math.isfinite(mean) else 0.0 for name, mean in (step_means or {}).items()}
        self._ignored_ids = torch.tensor(sorted(ignored_ids), dtype=torch.int64)
        self._token_weights = config.token_weights.at(0)
        terms = {name: TERMS[type(term)](name, term, temperature) for name, term in config.at(0).terms.items()}
        self._of_states = {name: term for name, term in terms.items() if isinstance(term, RepresentationLoss)}
        self._terms = {name: term for name, term in terms.items() if name not in self._of_states}

    @torch.no_grad()
    def plan(self, tokens: CompletionTokens, first_pass: Evaluation | None) -> TokenPlan:
        """Derive from all tokens of some trajectories what depends on the whole of them.

        `first_pass` is what the current student says of them, if `needs.first_pass`.
        """
        if self.needs.first_pass and first_pass is None:
            raise ValueError(
                "plan: the objective looks at whole trajectories under the current student; pass first_pass"
            )
        if self.needs.step_means and not self._step_means:
            raise ValueError("plan: the objective subtracts mean advantages of the whole step; pass step_means")
        added = {name: term.later_advantages(tokens, first_pass) for name, term in self._terms.items()}
        trusted = {name: term.trusted_trajectory(tokens, first_pass) for name, term in self._terms.items()}
        weights = self._weights(tokens, first_pass)
        means = {name: torch.full_like(tokens.rollout_logprobs, -mean) for name, mean in self._step_means.items()}
        for name, advantages, of_term in self._centred(tokens, first_pass, "response_mean"):
            means[name] = -weighted_mean_of_trajectory(advantages, of_term, tokens.trajectory)
        return TokenPlan(weights, _given(added) | means, _given(trusted), torch.zeros_like(weights))

    @torch.no_grad()
    def advantage_sums(self, tokens: CompletionTokens, first_pass: Evaluation) -> dict[str, Mean]:
        """Return some tokens' part of the mean advantages, by weight, of the terms that subtract the step's."""
        return {
            name: Mean(float((of_term * advantages).sum()), float(of_term.sum()))
            for name, advantages, of_term in self._centred(tokens, first_pass, "batch_mean")
        }

    def _centred(
        self, tokens: CompletionTokens, first_pass: Evaluation | None, baseline: str
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the terms with a baseline of this name, their advantages, and their tokens' weights in its mean."""
        for name, term in self._terms.items():
            if getattr(term.config, "baseline", None) == baseline and first_pass is not None:
                advantages = term.centred_advantages(tokens, first_pass)
                assert advantages is not None
                weights = self._weights(tokens, first_pass).double()
                yield name, advantages, weights * tokens.written_by(term.config.rows)

    @torch.no_grad()
    def evaluate(
        self,
        logits: Tensor,
        tokens: CompletionTokens,
        plan: TokenPlan,
        model_logits: Mapping[str, Tensor],
        with_gradient: bool,
    ) -> Evaluation:
        """Compute the losses of some tokens and their gradient by the student's logits.

        Args:
            logits: the current student's, [n, vocabulary], in float32 or float64 overwritten; others are converted.
            tokens, plan: the n tokens, or any part of those that `plan` was called with, and what it returned for them.
            model_logits: if `needs.hidden`: model -> [n, its vocabulary], overwritten. Where vocabularies differ in
                size, divergences compare both models on the tokens that they share, renormalised.
            with_gradient: whether to compute `logits_gradient`.
        """
        logits, kernels = at_least_float32(logits), self.kernels
        plan = replace(plan, normaliser=temperature_normaliser(logits, self.temperature))
        if not self.needs.hidden:
            result = evaluate_listed(self._terms, self.needs, logits, tokens, plan, with_gradient, kernels)
        elif kernels is not None and takes_fused(self._terms, kernels, logits):
            result = evaluate_fused(self._terms, logits, tokens, plan, model_logits, with_gradient, kernels)
        else:
            models = {model: at_least_float32(values) for model, values in model_logits.items()}
            result = evaluate_full(self._terms, logits, tokens, plan, models, with_gradient)
        return replace(result, at_sampling_temperature=result.logprobs / self.temperature - plan.normaliser)

    @property
    def reads_logits(self) -> bool:
        """Return whether there are terms with a gradient by the logits."""
        return bool(self._terms)

    def student_layers(self, depth: int) -> tuple[int, ...]:
        """Return the layers of a student of so many whose hidden states `align` compares, each once."""
        return tuple(sorted({layer for term in self._of_states.values() for layer in term.layers(depth)}))

    def align(
        self,
        states: Mapping[int, Tensor],
        scores: Scores,
        tokens: CompletionTokens,
        plan: TokenPlan,
        logprobs: Tensor,
        depth: int,
    ) -> Alignment:
        """Compare the student's hidden states with the target's at the rows that predict some tokens.

        Args:
            states: layer -> [n, width], of `student_layers(depth)`, at least one.
            scores: model -> signal -> [n, width]: what the models sent.
            tokens, plan: as in `evaluate`.
            logprobs: the current student's of the sampled tokens, [n].
            depth: layers that the student has.
        """
        return align(self._of_states, states, scores, Chunk(tokens, plan, logprobs[:, None]), depth)

    def _weights(self, tokens: CompletionTokens, first_pass: Evaluation | None) -> Tensor:
        config = self._token_weights
        weights = tokens.weight * is_early(
            tokens.position, tokens.length, config.first_tokens, config.first_fraction, config.skip_first
        )
        if len(tokens.turn) and isinstance(config.first_turns, int):
            weights = weights * (tokens.turn < config.first_turns)
        if len(tokens.turn) and config.turns == "equal":
            weights = weights * turn_weights(tokens.turn, tokens.trajectory)
        if len(self._ignored_ids):
            weights = weights * ~torch.isin(tokens.target_ids, self._ignored_ids.to(weights.device))
        if config.position_importance and first_pass is not None:
            log_ratio = log_linear({TEACHER: 1.0}, tokens.logprobs) - first_pass.logprobs
            weights = weights * position_importance(log_ratio, tokens.trajectory, config.position_importance)
        if config.entropy != "none":
            sure = tokens.teacher_entropy if config.entropy in ("teacher", "both") else None
            unsure = first_pass.entropy if first_pass is not None and config.entropy in ("student", "both") else None
            weights = weights * entropy_weights(sure, unsure, tokens.trajectory)
        return weights


def _given(columns: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: column for name, column in columns.items() if column is not None}
