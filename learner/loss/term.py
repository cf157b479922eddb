"""Defines what a kind of term computes, of which tokens it reads what, and how terms are weighted and added up."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cluster.config.terms import AnyTerm, Target
from learner.loss.divergences import Divergence, is_tail_floored, to_buckets
from learner.loss.policy_gradient import importance_ratio
from learner.loss.targets import log_linear, log_normaliser, target_buckets
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
    # [n] of all tokens but the candidates, also where these leave no more than the floor of a tail; another leaf.
    log_tail: Tensor | None = None
    # [n] the student's mean over the vocabulary of a function of log target and log student; None: the candidates'
    exact_mean: Callable[[Target, Callable[[Tensor, Tensor], Tensor]], Tensor] | None = None

    @property
    def rollout(self) -> Tensor:
        """Return the rollout worker's log-probabilities, [n, 1 + k], or [n, 1] where candidates are the teacher's."""
        return torch.cat([self.tokens.rollout_logprobs[:, None], self.tokens.candidate_rollout_logprobs], dim=-1)

    def compare(self, divergence: Divergence, parameter: float, target: Target, truncation: str) -> Tensor:
        """Return the divergence between student and target over the candidates, [n]."""
        student = self.student_buckets(target, truncation)
        buckets = target_buckets(target, self.tokens.candidate_logprobs, self.inside, truncation)
        return divergence.losses(student, buckets, parameter)

    def student_buckets(self, target: Target, truncation: str) -> Tensor:
        """Return the student's log-probabilities of what a truncation compares, [n, k] or [n, k + 1].

        Its own tail below the floor is taken from its logits where the target has more: the teacher's is known from
        candidates alone, so where both are at the floor, they are equal as far as that goes.
        """
        buckets = to_buckets(self.student[:, 1:], self.inside, truncation)
        if self.log_tail is None or truncation != "tail":
            return buckets
        is_small = is_tail_floored(self.student[:, 1:], self.inside)
        for model in (model for model, share in target.items() if share):
            is_small &= ~is_tail_floored(self.tokens.candidate_logprobs[model], self.inside)
        tail = torch.where(is_small, self.log_tail, buckets[:, -1])
        return torch.cat([buckets[:, :-1], tail[:, None]], dim=-1)

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
        tail = self.student_buckets(target, "tail")[:, -1]
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

    def centred_advantages(self, _tokens: CompletionTokens, _first_pass: Evaluation) -> Tensor | None:
        """Return the advantages of which the step's mean, or the response's, is taken off, [n]; None: it is not."""
        return None

    def trusted_trajectory(self, _tokens: CompletionTokens, _first_pass: Evaluation | None) -> Tensor | None:
        """Return whether each token's trajectory counts, [n]; None: all do."""
        return None


def sum_of_terms(terms: Mapping[str, LossTerm], chunk: Chunk) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the terms' losses [n], and the gradients of their sum by the chunk's leaves.

    These are its log-probabilities, [n, 1 + k], and that of the tail, [n]; None: it is not given, or not read.
    """
    student = chunk.student.requires_grad_()
    tail = [] if chunk.log_tail is None else [chunk.log_tail.requires_grad_()]
    with torch.enable_grad():
        losses = 0.0 * student.sum(-1)  # a term without a gradient, such as one without candidates, needs a graph too
        for term in terms.values():
            weights = token_weights(term.config, chunk)
            losses = losses + term.losses(chunk) * weights
        total = losses.sum()
    gradient, *of_tail = torch.autograd.grad(total, [student, *tail], allow_unused=True)
    return losses.detach(), gradient, next(iter(of_tail), None)


def token_weights(config: AnyTerm, chunk: Chunk) -> Tensor:
    """Return how much each token counts in the term, [n]."""
    assert isinstance(config.weight, float | int), "`Objective` takes one step's"
    weights = config.weight * chunk.plan.weights
    if config.rows != "all":
        weights = weights * chunk.tokens.written_by(config.rows)
    if config.when == "always":
        return weights
    return weights * _is_chosen(config, chunk)


def _is_chosen(config: AnyTerm, chunk: Chunk) -> Tensor:
    """Return at which tokens the term's condition holds, [n]; each pair of conditions splits the tokens in two."""
    if config.when in OTHERWISE:
        return ~CONDITIONS[OTHERWISE[config.when]](config, chunk)
    return CONDITIONS[config.when](config, chunk)


def _log_ratio(config: AnyTerm, chunk: Chunk) -> Tensor:
    return log_linear(config.target, chunk.tokens.logprobs) - chunk.student[:, 0]


def _models_agree(config: AnyTerm, chunk: Chunk) -> Tensor:
    is_above = torch.stack([chunk.tokens.logprobs[model] > chunk.student[:, 0] for model in config.target])
    return is_above.all(0) | ~is_above.any(0)


CONDITIONS: dict[str, Callable[[AnyTerm, Chunk], Tensor]] = {
    "teacher_entropy_above": lambda term, chunk: chunk.tokens.teacher_entropy > term.threshold,
    "log_ratio_positive": lambda term, chunk: _log_ratio(term, chunk) > 0,
    "trusted": lambda term, chunk: chunk.tokens.uniform < _log_ratio(term, chunk).clamp(max=0.0).exp(),
    "outside_support": lambda _, chunk: chunk.is_outside,
    "reward_positive": lambda _, chunk: chunk.tokens.reward > 0,  # not without a reward
    "advantage_positive": lambda _, chunk: chunk.tokens.task_advantage > 0,
    "outcome_agrees": lambda term, chunk: _log_ratio(term, chunk) * chunk.tokens.task_advantage > 0,
    "models_agree": _models_agree,
}
OTHERWISE = {
    "teacher_entropy_below": "teacher_entropy_above",
    "log_ratio_not_positive": "log_ratio_positive",
    "untrusted": "trusted",
    "reward_not_positive": "reward_positive",
    "advantage_not_positive": "advantage_positive",
    "outcome_disagrees": "outcome_agrees",
    "models_disagree": "models_agree",
}
