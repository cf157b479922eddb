"""Makes losses of what the student says of sampled tokens and candidates, by one class for each kind of term."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.config.objective import (
    OUTSIDE_SUPPORT,
    AnyTerm,
    DivergenceTerm,
    PolicyGradientTerm,
    Target,
    TaskRewardTerm,
    Term,
)
from learner.loss.divergences import DIVERGENCES, Divergence, find_divergence, to_buckets
from learner.loss.policy_gradient import (
    LARGEST_LOG_RATIO,
    LOG_RATIO_MAPS,
    SURROGATES,
    importance_ratio,
    temperature_shift,
)
from learner.loss.targets import log_linear, log_normaliser, target_buckets
from learner.loss.token_weights import is_trusted_trajectory, later_returns
from learner.loss.tokens import CompletionTokens, Evaluation, TokenPlan


@dataclass(frozen=True)
class Chunk:
    """Holds some completion tokens and what the student says of them."""

    tokens: CompletionTokens
    plan: TokenPlan
    student: Tensor  # [n, 1 + k] log-probabilities of the sampled token and the candidates; a leaf of the graph
    sampled_candidates: bool = False  # the candidates are independent draws, like the sampled token
    inside: Tensor | None = None  # [n, k] which candidates take part; None: all
    exact_kl: Callable[[Target], Tensor] | None = None  # [n] KL(student || target); None: the candidates' is used

    @property
    def rollout(self) -> Tensor:
        """Return the rollout worker's log-probabilities, [n, 1 + k], or [n, 1] where candidates are the teacher's."""
        return torch.cat([self.tokens.rollout_logprobs[:, None], self.tokens.candidate_rollout_logprobs], dim=-1)

    def compare(self, divergence: Divergence, parameter: float, target: Target, truncation: str) -> Tensor:
        """Return the divergence between student and target over the candidates, [n]."""
        student = to_buckets(self.student[:, 1:], self.inside, truncation)
        buckets = target_buckets(target, self.tokens.candidate_logprobs, self.inside, truncation)
        return divergence.losses(student, buckets, parameter)

    @property
    def is_outside(self) -> Tensor:
        """Return whether the sampled token is none of the candidates that take part, [n]."""
        is_sampled = self.tokens.candidate_ids == self.tokens.target_ids[:, None]
        return ~(is_sampled if self.inside is None else is_sampled & self.inside).any(-1)

    def sampled_target(self, target: Target) -> Tensor:
        """Return the target's log-probability of the sampled token, normalised like the candidates', [n]."""
        return log_linear(target, self.tokens.logprobs) - log_normaliser(
            target, self.tokens.candidate_logprobs, self.inside
        )

    def residual(self, divergence: Divergence, parameter: float, target: Target) -> Tensor:
        """Return what the tail's bucket leaves out, estimated by a sampled token outside the candidates, [n].

        A divergence's gradient by p(v) is a slope s of the log-ratio d(v), and that of the bucket gives every token of
        the tail the slope of the tail's own ratio. The difference, s(d(v)) - s(d(tail)), weighs the gradient of log p
        of the sampled token, with the importance ratio (ResOPD, arXiv 2610.04882). A baseline b is taken off it, and
        b times the tail's mass is added, which leaves the expectation as it is: what the slopes of the candidates by
        themselves come to on average, for that of the tail's tokens is not known.
        """
        logprobs, inside = (self.student[:, 1:], self.tokens.candidate_logprobs), self.inside
        tail = to_buckets(logprobs[0], inside, "tail")[:, -1]
        support = to_buckets(logprobs[0], inside, "renormalized").detach()
        ratios = [
            (self.sampled_target(target) - self.student[:, 0])[:, None],
            (target_buckets(target, logprobs[1], inside, "tail")[:, -1] - tail)[:, None],
            target_buckets(target, logprobs[1], inside, "renormalized") - support,
        ]
        _, slopes = divergence.at(parameter).by_autograd(torch.cat(ratios, dim=-1).detach(), parameter)
        baseline = (support.exp() * slopes[:, 2:]).sum(-1)
        weight = importance_ratio(self.student[:, 0], self.tokens.rollout_logprobs)
        mass = 1 - to_buckets(logprobs[0], inside, "generalized").exp().sum(-1)  # below the tail's floor too
        return weight * self.is_outside * (slopes[:, 0] - slopes[:, 1] - baseline) + baseline * mass


class LossTerm(Protocol):
    """Computes one term of an objective. What it needs sampled and scored, its configuration says (`Needs`)."""

    config: Any  # its section of the run file

    @property
    def divergence(self) -> tuple[Divergence, float] | None:
        """Return the divergence that it is, with its parameter; None if it reads sampled tokens alone.

        Whole distributions, where they are shipped, are compared by the divergence, and `losses` is not called.
        """
        return None

    def losses(self, chunk: Chunk) -> Tensor:
        """Return the loss of each token, [n], not weighted yet; differentiable by the chunk's log-probabilities."""

    def later_advantages(self, _tokens: CompletionTokens, _first_pass: Evaluation | None) -> Tensor | None:
        """Return what the tokens after each one add to its advantage, [n]; None: nothing."""
        return None

    def trusted_trajectory(self, _tokens: CompletionTokens, _first_pass: Evaluation | None) -> Tensor | None:
        """Return whether each token's trajectory counts, [n]; None: all do."""
        return None


class DivergenceLoss(LossTerm):
    """Compares student and target by a divergence."""

    def __init__(self, name: str, config: DivergenceTerm, temperature: float) -> None:
        self.config = config
        divergence = find_divergence(config.divergence)
        self._divergence = divergence, float(getattr(config, divergence.parameter))

    @property
    def divergence(self) -> tuple[Divergence, float]:
        return self._divergence

    def losses(self, chunk: Chunk) -> Tensor:
        losses = chunk.compare(*self._divergence, self.config.target, self.config.truncation)
        return losses + chunk.residual(*self._divergence, self.config.target) if self.config.has_residual else losses


class AdvantageLoss(LossTerm):
    """Weighs tokens of the student by an advantage and the importance ratio.

    The ratio is that of the student to the one that wrote, both at the sampling temperature: it measures age. A weight
    p / p_T beside it, which nothing bounds, makes every expectation that of temperature 1.
    """

    config: PolicyGradientTerm | TaskRewardTerm

    def __init__(self, name: str, config: PolicyGradientTerm | TaskRewardTerm, temperature: float) -> None:
        self._name, self.config, self._temperature = name, config, temperature

    def trusted_trajectory(self, tokens: CompletionTokens, first_pass: Evaluation | None) -> Tensor | None:
        """Return whether the trajectory's mean importance ratio is within bounds, if the term asks for it."""
        bounds = self.config.importance
        if bounds.kind != "sequence_mask" or first_pass is None:
            return None
        return is_trusted_trajectory(
            first_pass.sampler_logprobs, tokens.rollout_logprobs, tokens.trajectory, bounds.low, bounds.high
        )

    def surrogate(self, chunk: Chunk, advantage: Tensor, columns: slice) -> Tensor:
        """Return the surrogate losses of some columns of the chunk's log-probabilities, [n, columns]."""
        student, rollout, bounds = chunk.student[:, columns], chunk.rollout[:, columns], self.config.importance
        shift = temperature_shift(student, self._temperature, chunk.plan.normaliser)
        losses = SURROGATES[bounds.kind](advantage.detach(), student + shift, rollout, bounds)
        losses = losses * (-shift).clamp(max=LARGEST_LOG_RATIO).exp()
        trusted = chunk.plan.trusted_trajectory.get(self._name)
        return losses if trusted is None else losses * trusted[:, None]


class TaskRewardLoss(AdvantageLoss):
    """Takes the reward within the group of the prompt's samples as the advantage of every token."""

    def losses(self, chunk: Chunk) -> Tensor:
        return self.surrogate(chunk, chunk.tokens.task_advantage[:, None], slice(0, 1)).sum(-1)


class PolicyGradientLoss(AdvantageLoss):
    """Takes the mapped log-ratio target / student as the advantage."""

    config: PolicyGradientTerm

    def losses(self, chunk: Chunk) -> Tensor:
        term, tokens = self.config, chunk.tokens
        log_target = log_linear(term.target, tokens.logprobs)[:, None]
        if term.when == OUTSIDE_SUPPORT:  # the rest of a sum over the support, and so on its scale
            log_target = chunk.sampled_target(term.target)[:, None]
        if term.over == "sampled":
            advantage = self._advantage(log_target, chunk.student[:, :1], self._rollout_at_1(chunk)[:, :1])
            advantage = advantage + self._added_advantage(chunk)[:, None]
            return self.surrogate(chunk, advantage, slice(0, 1)).sum(-1)
        # Of independent draws, the sampled token is one.
        columns = slice(0 if chunk.sampled_candidates else 1, None)
        rollout, rollout_at_1 = chunk.rollout[:, columns], self._rollout_at_1(chunk)[:, columns]
        if chunk.sampled_candidates:
            log_target = torch.cat([log_target, log_linear(term.target, tokens.candidate_logprobs)], dim=-1)
        elif term.student == "none":
            log_target = log_linear(term.target, tokens.candidate_logprobs)  # a difference, and no distribution
        else:
            # A constant is no baseline in a sum over part of the vocabulary.
            log_target = target_buckets(term.target, tokens.candidate_logprobs, chunk.inside, "generalized")
        losses = self.surrogate(chunk, self._advantage(log_target, chunk.student[:, columns], rollout_at_1), columns)
        if chunk.sampled_candidates:
            return losses.mean(-1)
        if term.normalize_weights:
            rollout = rollout - rollout_at_1.logsumexp(-1, keepdim=True)
        return (losses * rollout.exp()).sum(-1)

    def later_advantages(self, tokens: CompletionTokens, first_pass: Evaluation | None) -> Tensor | None:
        """Return the discounted advantages of the tokens that follow, if the term asks for them."""
        term = self.config
        if not term.discount:
            return None
        student = None if first_pass is None else first_pass.logprobs
        advantages = self._advantage(log_linear(term.target, tokens.logprobs), student, tokens.rollout_logprobs)
        return later_returns(advantages, tokens.trajectory, term.discount)

    def _advantage(self, log_target: Tensor, student: Tensor | None, rollout: Tensor) -> Tensor:
        """Return the mapped log-ratio; student is None where the term divides by another probability."""
        divisors = {"current": student, "rollout": rollout, "none": torch.zeros_like(log_target)}
        divisor = divisors[self.config.student]
        assert divisor is not None, "there was a first pass if the term needs one"
        return LOG_RATIO_MAPS[self.config.log_ratio_map](log_target, divisor, self.config)

    def _rollout_at_1(self, chunk: Chunk) -> Tensor:
        """Return the rollout worker's log-probabilities at temperature 1, [n, 1 + k].

        They lack a normaliser, which is that of the current student: for older ones a constant of the position is left.
        """
        return (chunk.rollout + chunk.plan.normaliser[:, None]) * self._temperature

    def _added_advantage(self, chunk: Chunk) -> Tensor:
        """Return what a sampled token's advantage has besides its log-ratio, [n]: later ones, minus the baseline.

        The baseline is that of its own prefix alone. Those of later prefixes depend on the token: taking them off the
        later advantages would change the expectation, for it would leave nothing of them.
        """
        added = torch.zeros_like(chunk.student[:, 0])
        if self.config.discount:
            added = added + chunk.plan.later_advantages[self._name]
        if self.config.baseline == "kl" and chunk.exact_kl is not None:
            added = added + chunk.exact_kl(self.config.target)
        elif self.config.baseline == "kl":
            added = added + chunk.compare(DIVERGENCES["reverse_kl"], 0.0, self.config.target, "tail")
        return added


TERMS: dict[type[Term], Callable[[str, Any, float], LossTerm]] = {
    DivergenceTerm: DivergenceLoss,
    PolicyGradientTerm: PolicyGradientLoss,
    TaskRewardTerm: TaskRewardLoss,
}


def sum_of_terms(terms: Mapping[str, LossTerm], chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return the terms' losses [n] and the gradient of their sum by the chunk's log-probabilities [n, 1 + k]."""
    student = chunk.student.requires_grad_()
    with torch.enable_grad():
        losses = 0.0 * student.sum(-1)  # a term without a gradient, such as one without candidates, needs a graph too
        for term in terms.values():
            weights = token_weights(term.config, chunk)
            losses = losses + term.losses(chunk) * weights
        total = losses.sum()
    (gradient,) = torch.autograd.grad(total, student)
    return losses.detach(), gradient


def token_weights(config: AnyTerm, chunk: Chunk) -> Tensor:
    """Return how much each token counts in the term, [n]."""
    weights = config.weight * chunk.plan.weights
    if config.when == "always":
        return weights
    return weights * _is_chosen(config, chunk)


def _is_chosen(config: AnyTerm, chunk: Chunk) -> Tensor:
    """Return at which tokens the term's condition holds, [n]; each pair of conditions splits the tokens in two."""
    tokens = chunk.tokens
    if config.when == OUTSIDE_SUPPORT:
        return chunk.is_outside
    if config.when.startswith("teacher_entropy"):
        above = tokens.teacher_entropy > config.threshold
        return above if config.when == "teacher_entropy_above" else ~above
    log_ratio = log_linear(config.target, tokens.logprobs) - chunk.student[:, 0]
    if config.when.startswith("log_ratio"):
        return log_ratio > 0 if config.when == "log_ratio_positive" else ~(log_ratio > 0)
    trusted = tokens.uniform < log_ratio.clamp(max=0.0).exp()
    return trusted if config.when == "trusted" else ~trusted
