"""Normalises hidden states on a CPU by vLLM's own kernels, in a third of the time of a chain of torch's operations.

vLLM registers these kernels for GPUs, and leaves CPUs to its compiler, which engines here do without.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cluster.actors.freed_memory import keep_freed_memory

PROVIDER = "preceptor_cpu"
LANES = 16  # values that the kernels take at once


def register() -> None:
    """Offer the kernels to vLLM on a CPU, and let its process keep the memory that it frees; nothing on a GPU.

    vLLM calls this in each of its processes as a plugin; 0.24 has no choice of kernels.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    keep_freed_memory()
    try:
        from vllm.ir.ops import fused_add_rms_norm, rms_norm
    except ImportError:
        return
    current_platform.import_ir_kernels()
    if PROVIDER not in rms_norm.impls:
        rms_norm.register_impl(PROVIDER, supports_args=_takes)(_norm)
        fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_sum, inplace=True)(_norm_of_sum)


def kernel_priorities() -> dict[str, Any]:
    """Return the argument of an engine that asks for the kernels, where its vLLM has one."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    if "ir_op_priority" not in {field.name for field in fields(AsyncEngineArgs)}:
        return {}
    return {"ir_op_priority": {"rms_norm": [PROVIDER], "fused_add_rms_norm": [PROVIDER]}}


def _norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    output = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(output, x.contiguous(), weight, epsilon)
    return output


def _norm_of_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    is_plain = variance_size is None and x.shape[-1] % LANES == 0
    return is_plain and weight is not None and weight.dtype == x.dtype


def _takes_sum(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    in_place = x.is_contiguous() and x_residual.is_contiguous() and x_residual.dtype == x.dtype
    return in_place and _takes(x, weight, epsilon, variance_size)
