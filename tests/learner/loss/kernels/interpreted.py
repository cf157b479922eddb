"""What the Triton kernels make of tensors on a CPU, by Triton's interpreter, in a process where nothing else is Triton.

Triton decides as it is imported whether it interprets or compiles. What passes between the processes has no tensors,
which would travel in shared memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig, Support
from learner.loss.kernels.choice import fault_of
from learner.loss.kernels.interface import Comparison, Divergence, Normaliser, RowStatistics
from learner.loss.kernels.triton_launch import TritonKernels
from learner.loss.objective import Objective
from learner.loss.softmax import student_facts
from learner.loss.tokens import CompletionTokens
from tests.learner.loss.builders import make_tokens

BLOCK = 16  # logits per tile


@dataclass(frozen=True)
class Case:
    """An objective, and what it is evaluated on."""

    objective: Mapping[str, Any]  # a run file's table
    logits: np.ndarray  # [n, vocabulary]
    models: Mapping[str, np.ndarray]  # model -> [n, its vocabulary] logits
    target_ids: tuple[int, ...]
    model_dtype: str = "float32"

    def tokens(self) -> CompletionTokens:
        """Return tokens that models score by these logits, written by a student a little off."""
        said = {model: torch.from_numpy(values).log_softmax(-1) for model, values in self.models.items()}
        rollout = torch.from_numpy(self.logits).log_softmax(-1) + 0.1
        return make_tokens(torch.tensor(self.target_ids), said, rollout)


def evaluate(case: Case, kernels: TritonKernels | None) -> dict[str, np.ndarray]:
    """Evaluate a case; None: in plain torch."""
    objective = Objective(msgspec.convert(case.objective, ObjectiveConfig), kernels)
    logits = torch.from_numpy(case.logits.copy())
    models = {name: torch.tensor(values).to(getattr(torch, case.model_dtype)) for name, values in case.models.items()}
    tokens = case.tokens()
    results = objective.evaluate(logits, tokens, objective.plan(tokens, None), models, with_gradient=True)
    facts = student_facts(torch.from_numpy(case.logits.copy()), tokens.target_ids, kernels)
    assert results.logits_gradient is not None
    found = {
        "losses": results.losses,
        "logprobs": results.student.logprobs,
        "entropy": results.student.entropy,
        "gradient": results.logits_gradient,
        "logprobs of a first pass": facts.logprobs,
        "entropy of a first pass": facts.entropy,
    }
    return {name: values.numpy() for name, values in found.items()}


def evaluate_interpreted(case: Case) -> dict[str, np.ndarray]:
    """Evaluate a case by the kernels; to be called in the interpreter's process."""
    return evaluate(case, OnCpu())


@dataclass(frozen=True)
class OnCpu(TritonKernels):
    """The kernels on a CPU."""

    device_type: str = "cpu"
    block: int = BLOCK


@dataclass(frozen=True)
class Flawed(OnCpu):
    """Kernels of which one is off by a hundredth, or does not start."""

    flaw: str = ""

    def compare(self, logits: Tensor, target: Tensor, divergence: Divergence) -> Comparison:
        """Compare, and start only if there is no such flaw."""
        if self.flaw == f"{divergence.name} does not start":
            raise RuntimeError("out of registers\nand much more")
        return super().compare(logits, target, divergence)

    def write_gradient(
        self, logits: Tensor, target: Tensor, divergence: Divergence, comparison: Comparison, weights: Tensor
    ) -> None:
        """Write a gradient that may be off."""
        super().write_gradient(logits, target, divergence, comparison, weights)
        if self.flaw == f"{divergence.name} is off":
            logits.mul_(1.01)

    def write_probabilities(self, logits: Tensor, whole: Normaliser, factors: Tensor) -> None:
        """Write probabilities that may be off."""
        super().write_probabilities(logits, whole, factors)
        if self.flaw == "softmax is off":
            logits.mul_(1.01)

    def statistics(self, logits: Tensor) -> RowStatistics:
        """Look, and find nothing finite if that is the flaw."""
        found = super().statistics(logits)
        if self.flaw == "softmax is not finite":
            found.entropy.fill_(torch.nan)
        return found


def fault_interpreted(flaw: str, support: Support) -> str | None:
    """Return what the choice finds in kernels with a flaw; to be called in the interpreter's process."""
    return fault_of(Flawed(block=4096, flaw=flaw), torch.device("cpu"), support)
