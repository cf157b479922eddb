"""Makes losses of advantages: of the log-ratio to the target, or of the verifier's reward."""

import torch
from torch import Tensor

from cluster.config.terms import OUTSIDE_SUPPORT, PolicyGradientTerm, TaskRewardTerm
from learner.loss.divergences import DIVERGENCES
from learner.loss.policy_gradient import LARGEST_LOG_RATIO, LOG_RATIO_MAPS, SURROGATES, temperature_shift
from learner.loss.targets import log_linear, target_buckets
from learner.loss.term import Chunk, LossTerm
from learner.loss.token_weights import is_trusted_trajectory, later_returns
from learner.loss.tokens import CompletionTokens, Evaluation


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

    def centred_advantages(self, tokens: CompletionTokens, first_pass: Evaluation) -> Tensor | None:
        """Return the mapped log-ratios, if the term takes their mean off.

        That of a step: Delta-MOPD, arXiv 2610.10460; that of a response: Residual Advantage, arXiv 2610.11519.
        """
        if self.config.baseline not in ("batch_mean", "response_mean"):
            return None
        return self._advantage(
            log_linear(self.config.target, tokens.logprobs), first_pass.logprobs, first_pass.logprobs
        )

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
        if self.config.discount or self.config.baseline in ("batch_mean", "response_mean"):
            added = added + chunk.plan.added_advantages[self._name]
        if self.config.baseline == "kl" and chunk.exact_kl is not None:
            added = added + chunk.exact_kl(self.config.target)
        elif self.config.baseline == "kl":
            added = added + chunk.compare(DIVERGENCES["reverse_kl"], 0.0, self.config.target, "tail")
        elif self.config.baseline == "support_mean":
            added = added - self._support_mean(chunk)
        return added

    def _support_mean(self, chunk: Chunk) -> Tensor:
        """Return the sum of p times mapped log-ratio over the support, [n] (Residual Advantage, arXiv 2610.11519)."""

        def mapped(log_target: Tensor, student: Tensor) -> Tensor:
            return self._advantage(log_target, student, student)

        if chunk.exact_mean is not None:
            return chunk.exact_mean(self.config.target, mapped)
        student = chunk.student[:, 1:]
        values = student.exp() * mapped(log_linear(self.config.target, chunk.tokens.candidate_logprobs), student)
        return (values if chunk.inside is None else values * chunk.inside).sum(-1)
