"""The Triton kernels on tensors of a CPU, by Triton's interpreter."""

import importlib
import sys
from typing import Any

import pytest

BLOCK = 16  # logits per tile
MODULES = ("learner.objective.row_kernels", "learner.objective.triton_rows")


def interpreted_kernels() -> Any:
    """Import the kernels a second time, for the interpreter; those for cards stay what the modules' names mean.

    Triton reads the variable when it decorates a kernel.
    """
    kept = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        triton_rows = importlib.import_module("learner.objective.triton_rows")
    for name in MODULES:
        del sys.modules[name]
    sys.modules.update(kept)
    return triton_rows.TritonKernels(device_type="cpu", block=BLOCK)
