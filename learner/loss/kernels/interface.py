"""Defines what kernels do with whole rows of logits, reading each row a few times.

On a GPU the passes over [n, vocabulary] take the time, and plain torch makes one per operation. A divergence takes two
kernels here: `compare` reads student and target and keeps a few numbers per row; once these have given the tokens'
weights, `write_gradient` reads both again and overwrites the student.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from learner.loss.divergences import LOWEST_LOGPROB


@dataclass(frozen=True)
class Normaliser:
    """Makes logits log-probabilities by two numbers a row: their sum would round what is left of large logits."""

    peak: Tensor  # [n] the largest logit
    log_sum: Tensor  # [n] logarithm of the sum of exp(logit - peak)

    def logprobs(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities, at least LOWEST_LOGPROB, of some of each row's logits [n, m]."""
        return ((logits - self.peak[:, None]) - self.log_sum[:, None]).clamp_(min=LOWEST_LOGPROB)


@dataclass(frozen=True)
class RowStatistics:
    """Holds what is read off rows of logits."""

    whole: Normaliser
    entropy: Tensor  # [n] in nats


@dataclass(frozen=True)
class Comparison:
    """Holds what is read off rows of the student's and the target's logits."""

    statistics: RowStatistics  # at the student's whole vocabulary
    shared: Normaliser  # of the student over the tokens that the target has too
    target: Normaliser
    losses: Tensor  # [n]
    mean: Tensor  # [n] of the gradient's slope under the student


class RowKernels(Protocol):
    """Work on rows of float32 logits, [n, vocabulary]."""

    errors: ClassVar[tuple[type[Exception], ...]]  # what they raise where they cannot be compiled or started

    def knows(self, divergence: str | None) -> bool:
        """Return whether they compute the divergence of that `Divergence.kernel`."""

    def takes(self, logits: Tensor) -> bool:
        """Return whether the kernels can work on these logits."""

    def statistics(self, logits: Tensor) -> RowStatistics:
        """Read each row once."""

    def write_probabilities(self, logits: Tensor, whole: Normaliser, factors: Tensor) -> None:
        """Overwrite the logits by their probabilities times a factor per row, [n]."""

    def compare(self, logits: Tensor, target: Tensor, divergence: str, parameter: float) -> Comparison:
        """Compare with a target's logits [n, width], float32 or bfloat16, over the student's first tokens."""

    def write_gradient(
        self, logits: Tensor, target: Tensor, divergence: str, parameter: float, comparison: Comparison, weights: Tensor
    ) -> None:
        """Overwrite the logits by the weighted divergences' gradient; weights are [n]."""
