"""What an objective does with whole rows of logits, by kernels that read each row a few times.

On a card the passes over [n, vocabulary] take the time, and plain torch makes one per operation. A divergence takes two
kernels here: `compare` reads student and target and keeps a few numbers per row; once these have given the tokens'
weights, `write_gradient` reads both again and overwrites the student.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from cluster.config.objective import AnyTerm, DivergenceTerm, Target
from learner.loss.divergences import LOWEST_LOGPROB
from learner.loss.targets import is_one_model
from learner.loss.terms import parameter_of, token_weights
from learner.loss.tokens import CompletionTokens, StudentFacts, TokenPlan, TokenResults


@dataclass(frozen=True)
class Normaliser:
    """What makes logits log-probabilities, in two parts: a sum of both would round what is left of large logits."""

    peak: Tensor  # [n] the largest logit
    log_sum: Tensor  # [n] logarithm of the sum of exp(logit - peak)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities, at least LOWEST_LOGPROB, of some of each row's logits [n, m]."""
        return ((logits - self.peak[:, None]) - self.log_sum[:, None]).clamp_(min=LOWEST_LOGPROB)


@dataclass(frozen=True)
class Divergence:
    """A divergence of `exact.py` and the number that shapes it."""

    name: str
    parameter: float

    @classmethod
    def of(cls, name: str, parameter: float) -> "Divergence":
        """Name a divergence at the ends of its parameter by what it is there.

        Example:
            >>> Divergence.of("jsd", 1.0).name
            'reverse_kl'
        """
        if name == "jsd" and parameter in (0, 1):
            return cls("reverse_kl" if parameter else "forward_kl", 0.0)
        if name.startswith("skewed") and parameter == 0:
            return cls(name.removeprefix("skewed_"), 0.0)
        return cls(name, float(parameter))

    @property
    def factor(self) -> float:
        """Return what p (slope - mean) is multiplied by in the gradient."""
        return 1.0 - self.parameter if self.name in ("jsd", "skewed_forward_kl") else 1.0


@dataclass(frozen=True)
class RowStatistics:
    """What is read off rows of logits."""

    whole: Normaliser
    entropy: Tensor  # [n] in nats


@dataclass(frozen=True)
class Comparison:
    """What is read off rows of the student's and the target's logits."""

    statistics: RowStatistics  # at the student's whole vocabulary
    shared: Normaliser  # of the student over the tokens that the target has too
    target: Normaliser
    losses: Tensor  # [n]
    mean: Tensor  # [n] of the gradient's slope under the student


class RowKernels(Protocol):
    """Kernels over rows of float32 logits, [n, vocabulary]."""

    errors: ClassVar[tuple[type[Exception], ...]]  # what they raise where they cannot be compiled or started

    def takes(self, logits: Tensor) -> bool:
        """Return whether the kernels can work on these logits."""

    def statistics(self, logits: Tensor) -> RowStatistics:
        """Read each row once."""

    def write_probabilities(self, logits: Tensor, whole: Normaliser, factors: Tensor) -> None:
        """Overwrite the logits by their probabilities times a factor per row, [n]."""

    def compare(self, logits: Tensor, target: Tensor, divergence: Divergence) -> Comparison:
        """Compare with a target's logits [n, width], float32 or bfloat16, over the student's first tokens."""

    def write_gradient(
        self, logits: Tensor, target: Tensor, divergence: Divergence, comparison: Comparison, weights: Tensor
    ) -> None:
        """Overwrite the logits by the weighted divergences' gradient; weights are [n]."""


@dataclass(frozen=True)
class FusedSoftmax:
    """`softmax.Softmax` without the probabilities, which are written as part of the gradient only."""

    kernels: RowKernels
    logits: Tensor  # [n, vocabulary]
    statistics: RowStatistics
    logprobs: Tensor  # [n, ids] of the tokens asked for

    @property
    def entropy(self) -> Tensor:
        """Return the entropy of each row, [n], in nats."""
        return self.statistics.entropy

    def gradient(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Turn the gradient by log-probabilities of ids [n, m] into that by all logits, in their memory."""
        self.kernels.write_probabilities(self.logits, self.statistics.whole, -gradient.sum(-1))
        return self.logits.scatter_add_(-1, ids, gradient)


def fused_softmax(kernels: RowKernels, logits: Tensor, ids: Tensor) -> FusedSoftmax:
    """Read off the log-probabilities of ids [n, m] and the entropy; the logits are left as they are."""
    statistics = kernels.statistics(logits)
    return FusedSoftmax(kernels, logits, statistics, statistics.whole.logprobs(logits.gather(-1, ids)))


@dataclass(frozen=True)
class FusedDivergence:
    """The one term of an objective over the whole vocabulary; `full_support.evaluate_full` says the same in torch."""

    kernels: RowKernels
    term: DivergenceTerm

    @classmethod
    def of(cls, terms: Mapping[str, AnyTerm], kernels: RowKernels | None, logits: Tensor) -> "FusedDivergence | None":
        """Return None unless there are kernels that take these logits, and nothing but one divergence to compute."""
        if kernels is None or len(terms) > 1 or not kernels.takes(logits):
            return None
        (term,) = terms.values()
        return cls(kernels, term) if isinstance(term, DivergenceTerm) else None

    def evaluate(
        self,
        logits: Tensor,
        tokens: CompletionTokens,
        plan: TokenPlan,
        model_logits: Mapping[str, Tensor],
        with_gradient: bool,
    ) -> TokenResults:
        """Evaluate the term and overwrite the logits by the gradient, and those of mixed models by their mixture."""
        width = min(values.shape[-1] for values in [logits, *model_logits.values()])
        target = mixed_logits(self.term.target, {model: values[:, :width] for model, values in model_logits.items()})
        divergence = Divergence.of(self.term.divergence, parameter_of(self.term))
        found = self.kernels.compare(logits, target, divergence)
        written = found.statistics.whole.logprobs(logits.gather(-1, tokens.target_ids[:, None]))[:, 0]
        weights = token_weights(self.term, tokens, plan, written).to(logits.dtype)
        if with_gradient:
            self.kernels.write_gradient(logits, target, divergence, found, weights)
        return TokenResults(
            found.losses * weights,
            StudentFacts(written, found.statistics.entropy),
            torch.zeros_like(weights),
            logits if with_gradient else None,
        )


def mixed_logits(target: Target, model_logits: Mapping[str, Tensor]) -> Tensor:
    """Return the target's logits, not normalised: those of its one model, or a mixture in the memory of the first."""
    (first, share), *others = [(model, share) for model, share in target.items() if share]
    if is_one_model(target):
        return model_logits[first]
    mixed = model_logits[first].float().mul_(share)
    for model, of_model in others:
        mixed.add_(model_logits[model], alpha=of_model)
    return mixed
