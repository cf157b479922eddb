"""The objective of a run: what its configuration makes of logits, term by term, with the gradient by the logits."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cluster.config.objective import TEACHER, AnyTerm, DivergenceTerm, ObjectiveConfig, PolicyGradientTerm
from learner.loss.full_vocabulary import evaluate_full
from learner.loss.kernels.interface import FusedDivergence, RowKernels
from learner.loss.softmax import any_softmax, at_least_float32, kth_largest
from learner.loss.targets import log_linear
from learner.loss.terms import Chunk, mapped_log_ratio, sum_of_terms
from learner.loss.token_weights import (
    entropy_weights,
    is_early,
    is_trusted_trajectory,
    later_returns,
    position_importance,
)
from learner.loss.tokens import CompletionTokens, StudentFacts, TokenPlan, TokenResults


class Objective:
    """A configured objective: `plan` looks at whole trajectories, `evaluate` at any of their tokens.

    Args:
        config: what to minimise.
        kernels: used where they take the logits; None: plain torch everywhere.

    Example:
        >>> Objective(ObjectiveConfig()).needs_first_pass
        False
    """

    def __init__(self, config: ObjectiveConfig, kernels: RowKernels | None = None) -> None:
        self.config, self.kernels = config, kernels
        self.needs_first_pass = _needs_first_pass(config)

    @torch.no_grad()
    def plan(self, tokens: CompletionTokens, first_pass: StudentFacts | None) -> TokenPlan:
        """Derive what depends on whole trajectories.

        Args:
            tokens: all completion tokens of some trajectories.
            first_pass: what the current student says of them (`softmax.student_facts`), if `needs_first_pass`.

        Raises:
            ValueError: the objective needs a first pass and has none.
        """
        if self.needs_first_pass and first_pass is None:
            raise ValueError(
                "plan: the objective looks at whole trajectories under the current student; pass first_pass"
            )
        return TokenPlan(
            self._weights(tokens, first_pass),
            self._later_advantages(tokens, first_pass),
            self._trusted_trajectories(tokens, first_pass),
        )

    @torch.no_grad()
    def evaluate(
        self,
        logits: Tensor,
        tokens: CompletionTokens,
        plan: TokenPlan,
        model_logits: Mapping[str, Tensor],
        with_gradient: bool,
    ) -> TokenResults:
        """Compute the losses of some tokens and their gradient by the student's logits.

        Args:
            logits: the current student's, [n, vocabulary], in float32 or float64 overwritten; others are converted.
            tokens: the n tokens, or any part of those that `plan` was made for.
            plan: of the same tokens.
            model_logits: for support "full": model -> [n, its vocabulary], overwritten. Where vocabularies differ in
                size, divergences compare both models on the tokens that they share, renormalised.
            with_gradient: whether to compute `logits_gradient`.
        """
        logits = at_least_float32(logits)
        if self.config.support != "full":
            return self._evaluate_listed(logits, tokens, plan, with_gradient)
        if fused := FusedDivergence.of(self.config.terms, self.kernels, logits):
            return fused.evaluate(logits, tokens, plan, model_logits, with_gradient)
        models = {model: at_least_float32(values) for model, values in model_logits.items()}
        results = evaluate_full(self.config.terms, logits, tokens, plan, models)
        return results if with_gradient else replace(results, logits_gradient=None)

    def _evaluate_listed(
        self, logits: Tensor, tokens: CompletionTokens, plan: TokenPlan, with_gradient: bool
    ) -> TokenResults:
        """Evaluate terms that look at written tokens and candidates alone: a few numbers per token take autograd."""
        candidates, inside = self._candidates(logits, tokens)
        ids = torch.cat([tokens.target_ids[:, None], candidates], dim=-1)
        softmax = any_softmax(logits, ids, self.kernels)
        chunk = Chunk(tokens, plan, softmax.logprobs.clone(), draws=self.config.support == "samples", inside=inside)
        losses, by_logprobs = sum_of_terms(self.config.terms, chunk)
        gradient = softmax.gradient(ids, by_logprobs) if with_gradient else None
        facts = StudentFacts(softmax.logprobs[:, 0], softmax.entropy)
        return TokenResults(losses, facts, self._mass(candidates, softmax.logprobs[:, 1:]), gradient)

    def _candidates(self, logits: Tensor, tokens: CompletionTokens) -> tuple[Tensor, Tensor | None]:
        """Return the candidates and which of them take part, None being all.

        A teacher whose vocabulary is padded may choose a token that the student does not have: it takes no part.
        """
        if self.config.candidates_from != "teacher":
            return tokens.candidate_ids, None
        inside = tokens.candidate_ids < logits.shape[-1]
        candidates = tokens.candidate_ids.clamp(max=logits.shape[-1] - 1)
        if self.config.support == "intersection":
            inside &= logits.gather(-1, candidates) >= kth_largest(logits, self.config.support_size)[:, None]
        return candidates, inside

    def _mass(self, candidates: Tensor, logprobs: Tensor) -> Tensor:
        """Return the student's probability of the distinct candidates; independent draws may repeat."""
        probabilities = logprobs.exp()
        if self.config.support != "samples":
            return probabilities.sum(-1)
        in_order, order = candidates.sort(dim=-1)
        is_new = torch.ones_like(in_order, dtype=torch.bool)
        is_new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
        return (probabilities.gather(-1, order) * is_new).sum(-1)

    def _weights(self, tokens: CompletionTokens, first_pass: StudentFacts | None) -> Tensor:
        config = self.config.token_weights
        weights = is_early(tokens.position, tokens.length, config.first_tokens, config.first_fraction).float()
        if config.position_importance and first_pass is not None:
            log_ratio = log_linear({TEACHER: 1.0}, tokens.logprobs) - first_pass.logprobs
            weights = weights * position_importance(log_ratio, tokens.trajectory, config.position_importance)
        if config.entropy != "none":
            sure = tokens.teacher_entropy if config.entropy in ("teacher", "both") else None
            unsure = first_pass.entropy if first_pass is not None and config.entropy in ("student", "both") else None
            weights = weights * entropy_weights(sure, unsure, tokens.trajectory)
        return weights

    def _later_advantages(self, tokens: CompletionTokens, first_pass: StudentFacts | None) -> dict[str, Tensor]:
        student = None if first_pass is None else first_pass.logprobs
        later = {}
        for name, term in self.config.terms.items():
            if isinstance(term, PolicyGradientTerm) and term.discount:
                log_target = log_linear(term.target, tokens.logprobs)
                advantages = mapped_log_ratio(term, log_target, student, tokens.rollout_logprobs)
                later[name] = later_returns(advantages, tokens.trajectory, term.discount)
        return later

    def _trusted_trajectories(self, tokens: CompletionTokens, first_pass: StudentFacts | None) -> dict[str, Tensor]:
        trusted = {}
        for name, term in self.config.terms.items():
            if _masks_sequences(term) and not isinstance(term, DivergenceTerm) and first_pass is not None:
                low, high = term.importance.low, term.importance.high
                trusted[name] = is_trusted_trajectory(
                    first_pass.logprobs, tokens.rollout_logprobs, tokens.trajectory, low, high
                )
        return trusted


def _needs_first_pass(config: ObjectiveConfig) -> bool:
    weights = config.token_weights
    if weights.position_importance or weights.entropy in ("student", "both"):
        return True
    return any(_masks_sequences(term) or _discounts_later_advantages(term) for term in config.terms.values())


def _masks_sequences(term: AnyTerm) -> bool:
    return not isinstance(term, DivergenceTerm) and term.importance.kind == "sequence_mask"


def _discounts_later_advantages(term: AnyTerm) -> bool:
    """Return whether the term adds up later advantages that depend on the current student."""
    return isinstance(term, PolicyGradientTerm) and term.discount > 0 and term.student == "current"
