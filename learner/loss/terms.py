"""What one configured term makes of the student's log-probabilities of written tokens and candidates."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.config.objective import TEACHER, AnyTerm, DivergenceTerm, PolicyGradientTerm, TaskRewardTerm
from learner.loss.divergences import BUCKET_DIVERGENCES, reverse_kl, to_buckets
from learner.loss.policy_gradient import LOG_RATIO_MAPS, SURROGATES, MapShape, RatioBounds
from learner.loss.targets import log_linear, target_buckets
from learner.loss.tokens import CompletionTokens, TokenPlan


@dataclass(frozen=True)
class Chunk:
    """Some completion tokens and what the student says of them."""

    tokens: CompletionTokens
    plan: TokenPlan
    student: Tensor  # [n, 1 + k] log-probabilities of the written token and the candidates; a leaf of the graph
    draws: bool = False  # the candidates are independent draws, like the written token
    inside: Tensor | None = None  # [n, k] which candidates take part; None: all
    exact_kl: Mapping[str, Tensor] | None = None  # term -> [n] KL(student || target); None: the candidates' is used


def sum_of_terms(terms: Mapping[str, AnyTerm], chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Return the terms' losses [n] and the gradient of their sum by the chunk's log-probabilities [n, 1 + k]."""
    student = chunk.student.requires_grad_()
    with torch.enable_grad():
        losses = 0.0 * student.sum(-1)  # a term without a gradient, such as one without candidates, needs a graph too
        for name, term in terms.items():
            losses = losses + _losses(name, term, chunk)
        total = losses.sum()
    (gradient,) = torch.autograd.grad(total, student)
    return losses.detach(), gradient


def token_weights(term: AnyTerm, tokens: CompletionTokens, plan: TokenPlan, student: Tensor) -> Tensor:
    """Return how much each token counts in the term, [n]; student [n] is that of the written tokens."""
    weights = term.weight * plan.weights
    if term.when == "always":
        return weights
    return weights * _is_chosen(term, tokens, student)


def parameter_of(term: DivergenceTerm) -> float:
    """Return the number that shapes the term's divergence."""
    return term.beta if term.divergence == "jsd" else term.skew


def mapped_log_ratio(term: PolicyGradientTerm, log_target: Tensor, student: Tensor | None, rollout: Tensor) -> Tensor:
    """Return the term's map of target / student probability; student is None where the term divides by another."""
    if term.student == "current":
        assert student is not None
        divisor = student
    else:
        divisor = rollout if term.student == "rollout" else torch.zeros_like(log_target)
    shape = MapShape(term.bound, term.scale, term.alpha)
    return LOG_RATIO_MAPS[term.log_ratio_map](log_target, divisor, shape)


def _losses(name: str, term: AnyTerm, chunk: Chunk) -> Tensor:
    """Return the term's loss of each token, weighted, [n]."""
    if isinstance(term, DivergenceTerm):
        losses = _divergence(term, chunk)
    elif isinstance(term, PolicyGradientTerm):
        losses = _policy_gradient(name, term, chunk)
    else:
        losses = _surrogate(name, term, chunk, chunk.tokens.task_advantage[:, None], slice(0, 1)).sum(-1)
    return losses * token_weights(term, chunk.tokens, chunk.plan, chunk.student[:, 0])


def _divergence(term: DivergenceTerm, chunk: Chunk) -> Tensor:
    student = to_buckets(chunk.student[:, 1:], chunk.inside, term.truncation)
    target = target_buckets(term.target, chunk.tokens.candidate_logprobs, chunk.inside, term.truncation)
    return BUCKET_DIVERGENCES[term.divergence](student, target, parameter_of(term))


def _policy_gradient(name: str, term: PolicyGradientTerm, chunk: Chunk) -> Tensor:
    tokens, columns = chunk.tokens, _columns(term, chunk)
    log_target = log_linear(term.target, tokens.logprobs)[:, None]
    if term.over == "support":
        log_target = torch.cat([log_target, log_linear(term.target, tokens.candidate_logprobs)], dim=-1)
    rollout = _rollout(tokens)[:, columns]
    advantage = mapped_log_ratio(term, log_target[:, columns], chunk.student[:, columns], rollout)
    if term.over == "sampled":
        advantage = advantage + _added_advantage(name, term, chunk)[:, None]
        return _surrogate(name, term, chunk, advantage, columns).sum(-1)
    losses = _surrogate(name, term, chunk, advantage, columns)
    return losses.mean(-1) if chunk.draws else (losses * rollout.exp()).sum(-1)


def _columns(term: PolicyGradientTerm, chunk: Chunk) -> slice:
    """Return which of written token and candidates the term sums over: of independent draws, the written one is one."""
    if term.over == "sampled":
        return slice(0, 1)
    return slice(0, None) if chunk.draws else slice(1, None)


def _added_advantage(name: str, term: PolicyGradientTerm, chunk: Chunk) -> Tensor:
    """Return what a written token's advantage has besides its log-ratio, [n]: later advantages, minus the baseline.

    The baseline is that of its own prefix alone. Those of later prefixes depend on the token: taking them off the later
    advantages would change the expectation, for it would leave nothing of them.
    """
    added = torch.zeros_like(chunk.student[:, 0])
    if term.discount:
        added = added + chunk.plan.later_advantages[name]
    if term.baseline == "kl":
        added = added + _kl_of_prefix(name, term, chunk)
    return added


def _kl_of_prefix(name: str, term: PolicyGradientTerm, chunk: Chunk) -> Tensor:
    if chunk.exact_kl is not None:
        return chunk.exact_kl[name]
    student = to_buckets(chunk.student[:, 1:], chunk.inside, "tail")
    return reverse_kl(student, target_buckets(term.target, chunk.tokens.candidate_logprobs, chunk.inside, "tail"))


def _surrogate(
    name: str, term: PolicyGradientTerm | TaskRewardTerm, chunk: Chunk, advantage: Tensor, columns: slice
) -> Tensor:
    importance = term.importance
    bounds = RatioBounds(importance.low, importance.high, importance.dual_clip)
    student, rollout = chunk.student[:, columns], _rollout(chunk.tokens)[:, columns]
    losses = SURROGATES[importance.kind](advantage.detach(), student, rollout, bounds)
    trusted = chunk.plan.trusted_trajectory.get(name)
    return losses if trusted is None else losses * trusted[:, None]


def _rollout(tokens: CompletionTokens) -> Tensor:
    return torch.cat([tokens.rollout_logprobs[:, None], tokens.candidate_rollout_logprobs], dim=-1)


def _is_chosen(term: AnyTerm, tokens: CompletionTokens, student: Tensor) -> Tensor:
    """Return at which tokens the term's condition holds, [n]; each pair of conditions splits the tokens in two."""
    if term.when.startswith("teacher_entropy"):
        above = tokens.teacher_entropy > term.threshold
        return above if term.when == "teacher_entropy_above" else ~above
    target = {TEACHER: 1.0} if isinstance(term, TaskRewardTerm) else term.target
    log_ratio = log_linear(target, tokens.logprobs) - student
    if term.when.startswith("log_ratio"):
        return log_ratio > 0 if term.when == "log_ratio_positive" else ~(log_ratio > 0)
    trusted = tokens.uniform < log_ratio.clamp(max=0.0).exp()
    return trusted if term.when == "trusted" else ~trusted
