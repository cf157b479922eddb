"""Names the kinds of terms, and makes losses of divergences and of the written tokens' log-probabilities."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cluster.config.terms import (
    CrossEntropyTerm,
    DivergenceTerm,
    PolicyGradientTerm,
    RepresentationTerm,
    TaskRewardTerm,
    Term,
)
from learner.loss.advantage_terms import PolicyGradientLoss, TaskRewardLoss
from learner.loss.divergences import Divergence, find_divergence
from learner.loss.representation import RepresentationLoss
from learner.loss.term import Chunk, LossTerm


class DivergenceLoss(LossTerm):
    """Compares student and target by a divergence."""

    def __init__(self, name: str, config: DivergenceTerm, temperature: float) -> None:
        self.config = config
        divergence = find_divergence(config.divergence).clipped(config.entry_clip)
        self._divergence = divergence, float(getattr(config, divergence.parameter))

    @property
    def divergence(self) -> tuple[Divergence, float]:
        return self._divergence

    def losses(self, chunk: Chunk) -> Tensor:
        losses = chunk.compare(*self._divergence, self.config.target, self.config.truncation)
        return losses + chunk.residual(*self._divergence, self.config.target) if self.config.has_residual else losses


class CrossEntropyLoss(LossTerm):
    """Imitates the written tokens, gated if asked for (Pedagogical RL, Chakraborty et al.)."""

    def __init__(self, name: str, config: CrossEntropyTerm, temperature: float) -> None:
        self.config = config

    def losses(self, chunk: Chunk) -> Tensor:
        logprobs, gate = chunk.student[:, 0], self.config.gate
        if gate is None:
            return -logprobs
        return -logprobs * (gate.kappa * (logprobs.detach() - gate.gamma)).sigmoid()


TERMS: dict[type[Term], Callable[[str, Any, float], LossTerm]] = {
    DivergenceTerm: DivergenceLoss,
    PolicyGradientTerm: PolicyGradientLoss,
    TaskRewardTerm: TaskRewardLoss,
    RepresentationTerm: RepresentationLoss,
    CrossEntropyTerm: CrossEntropyLoss,
}
