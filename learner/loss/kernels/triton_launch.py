"""Starts the Triton kernels over rows of logits; only this file and `triton_kernels` import triton."""

import subprocess
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from learner.loss.kernels.interface import Comparison, Normaliser, RowStatistics
from learner.loss.kernels.triton_kernels import (
    COMPARISON_FIELDS,
    KNOWN,
    STATISTICS_FIELDS,
    compare_kernel,
    gradient_kernel,
    probabilities_kernel,
    statistics_kernel,
)

# Untuned: compiled for Hopper, they leave the kernel with the most registers three programs per multiprocessor.
BLOCK = 2048  # logits per tile
NUM_WARPS = 8


@dataclass(frozen=True)
class TritonKernels:
    """Implements `RowKernels` for the tensors of one kind of device."""

    # Triton's own, those of its compilers, and, where it finds no C compiler for its launchers, the system's.
    errors: ClassVar[tuple[type[Exception], ...]] = (
        TritonError,
        RuntimeError,
        ValueError,
        NotImplementedError,
        OSError,
        subprocess.SubprocessError,
    )

    device_type: str = "cuda"
    block: int = BLOCK
    num_warps: int = NUM_WARPS

    def knows(self, divergence: str | None) -> bool:
        return divergence in KNOWN

    def takes(self, logits: Tensor) -> bool:
        is_here = logits.device.type == self.device_type and logits.dtype == torch.float32
        return is_here and len(logits) > 0 and logits.stride(-1) == 1

    def statistics(self, logits: Tensor) -> RowStatistics:
        count, vocabulary = logits.shape
        table = logits.new_empty(STATISTICS_FIELDS, count)
        statistics_kernel[(count,)](
            logits, table, logits.stride(0), count, vocabulary, BLOCK=self.block, num_warps=self.num_warps
        )
        return RowStatistics(Normaliser(table[0], table[1]), table[2])

    def write_probabilities(self, logits: Tensor, whole: Normaliser, factors: Tensor) -> None:
        count, vocabulary = logits.shape
        tiles = triton.cdiv(vocabulary, self.block)
        probabilities_kernel[(count * tiles,)](
            logits,
            torch.stack([whole.peak, whole.log_sum, factors]),
            logits.stride(0),
            count,
            vocabulary,
            tiles,
            BLOCK=self.block,
            num_warps=self.num_warps,
        )

    def compare(self, logits: Tensor, target: Tensor, divergence: str, parameter: float) -> Comparison:
        assert target.stride(-1) == 1, "a head's logits lie row by row"
        table = logits.new_empty(COMPARISON_FIELDS, len(logits))
        arguments = _arguments(logits, target, table, parameter)
        compare_kernel[(len(logits),)](*arguments, NAME=divergence, BLOCK=self.block, num_warps=self.num_warps)
        student, shared, goal = (Normaliser(table[row], table[row + 1]) for row in (0, 3, 5))
        return Comparison(RowStatistics(student, table[2]), shared, goal, table[7], table[8])

    def write_gradient(
        self, logits: Tensor, target: Tensor, divergence: str, parameter: float, comparison: Comparison, weights: Tensor
    ) -> None:
        tiles = triton.cdiv(logits.shape[-1], self.block)
        shared, goal = comparison.shared, comparison.target
        table = torch.stack([shared.peak, shared.log_sum, goal.peak, goal.log_sum, comparison.mean, weights])
        arguments = (*_arguments(logits, target, table, parameter), tiles)
        gradient_kernel[(len(logits) * tiles,)](*arguments, NAME=divergence, BLOCK=self.block, num_warps=self.num_warps)


def _arguments(logits: Tensor, target: Tensor, table: Tensor, parameter: float) -> tuple[Any, ...]:
    """Return the arguments with which `compare_kernel` and `gradient_kernel` begin."""
    (count, vocabulary), width = logits.shape, target.shape[-1]
    return logits, target, table, logits.stride(0), target.stride(0), count, vocabulary, width, parameter
