"""What the Triton kernels make of tensors on a CPU, by Triton's interpreter, in a process where nothing else is Triton.

Triton decides as it is imported whether it interprets or compiles. What passes between the processes has no tensors,
which would travel in shared memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from torch import Tensor

from cluster.config.objective import ObjectiveConfig
from learner.loss.divergences import DIVERGENCES, Divergence
from learner.loss.kernels.choice import fault_of
from learner.loss.kernels.interface import Comparison, Normaliser, RowStatistics
from learner.loss.kernels.triton_launch import TritonKernels
from learner.loss.objective import Objective
from learner.loss.softmax import read_tokens
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
    num_candidates: int = 0  # the teacher's most likely tokens
    temperature: float = 1.0  # of the sampler

    def tokens(self) -> CompletionTokens:
        """Return tokens that models score by these logits, written by a student a little off."""
        said = {model: torch.from_numpy(values).log_softmax(-1) for model, values in self.models.items()}
        rollout = torch.from_numpy(self.logits).log_softmax(-1) + 0.1
        candidate_ids = said["teacher"].topk(self.num_candidates).indices
        return make_tokens(torch.tensor(self.target_ids), said, rollout, candidate_ids)


def evaluate(case: Case, kernels: TritonKernels | None) -> dict[str, np.ndarray]:
    """Evaluate a case; None: in plain torch."""
    objective = Objective(msgspec.convert(case.objective, ObjectiveConfig), kernels, case.temperature)
    logits = torch.from_numpy(case.logits.copy())
    models = {name: torch.tensor(values).to(getattr(torch, case.model_dtype)) for name, values in case.models.items()}
    tokens = case.tokens()
    results = objective.evaluate(logits, tokens, objective.plan(tokens, None), models, with_gradient=True)
    of_first_pass = read_tokens(torch.from_numpy(case.logits.copy()), tokens.target_ids, kernels)
    assert results.logits_gradient is not None
    found = {
        "losses": results.losses,
        "logprobs": results.logprobs,
        "entropy": results.entropy,
        "logprobs at the sampling temperature": results.sampler_logprobs,
        "gradient": results.logits_gradient,
        "logprobs of a first pass": of_first_pass[0],
        "entropy of a first pass": of_first_pass[1],
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

    def compare(self, logits: Tensor, target: Tensor, divergence: str, parameter: float) -> Comparison:
        """Compare, and start only if there is no such flaw."""
        if self.flaw == f"{divergence} does not start":
            raise RuntimeError("out of registers\nand much more")
        return super().compare(logits, target, divergence, parameter)

    def write_gradient(
        self, logits: Tensor, target: Tensor, divergence: str, parameter: float, comparison: Comparison, weights: Tensor
    ) -> None:
        """Write a gradient that may be off."""
        super().write_gradient(logits, target, divergence, parameter, comparison, weights)
        if self.flaw == f"{divergence} is off":
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


def fault_interpreted(flaw: str, whole_vocabulary: bool) -> str | None:
    """Return what the choice finds in kernels with a flaw; to be called in the interpreter's process."""
    return fault_of(Flawed(block=4096, flaw=flaw), torch.device("cpu"), whole_vocabulary)


TORCH_ONLY = Divergence(lambda d, _: d.exp() - 1 - d)


def fault_with_another_divergence() -> str | None:
    """Return the same of kernels without a flaw, when the table has a divergence that they do not know."""
    with patch.dict(DIVERGENCES, {"torch_only": TORCH_ONLY}):
        return fault_interpreted("", True)


def compare_interpreted(divergence: str, logits: np.ndarray) -> None:
    """Start the kernels on a divergence of any name; to be called in the interpreter's process."""
    values = torch.from_numpy(logits)
    OnCpu().compare(values, values.clone(), divergence, 0.0)
