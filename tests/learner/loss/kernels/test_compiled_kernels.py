"""The kernels over rows of logits compile for the cards they are meant for, which takes no card."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.errors import CompilationError

from learner.loss.kernels import triton_kernels
from learner.loss.kernels.triton_launch import BLOCK, NUM_WARPS

POINTERS = ("logits", "target", "table")
STRIDES = ("stride", "logits_stride", "target_stride")
THREADS_PER_WARP = 32
REGISTERS = 65_536  # of a multiprocessor
SPILLED_BYTES = 32  # of a thread; Triton 3.7 spills 16 of one kernel, 3.6 and 3.9 none
PROGRAMS = 2  # on one multiprocessor: while one waits at a barrier, another reads
COMPILED = [(triton_kernels.statistics_kernel, None), (triton_kernels.probabilities_kernel, None)]
COMPILED += [
    (kernel, name)
    for kernel in (triton_kernels.compare_kernel, triton_kernels.gradient_kernel)
    for name in sorted(triton_kernels.KNOWN)
]


def compiled(kernel: Any, divergence: str | None, capability: int, target: str = "*fp32") -> Any:
    """Compile a kernel as the learner calls it, where addresses, strides and widths are multiples of 16."""
    constants = {"BLOCK": BLOCK} | ({} if divergence is None else {"NAME": divergence})
    kinds = dict.fromkeys(POINTERS, "*fp32") | dict.fromkeys(STRIDES, "i64") | {"parameter": "fp32", "target": target}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = (*POINTERS, *STRIDES, "vocabulary", "width")
    places = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=places)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})


def resources(cubin: Path) -> dict[str, int]:
    """Return what each thread of a compiled kernel takes, as NVIDIA's tool, which comes with Triton, reads it."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile anew, whatever this machine has compiled before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "divergence"), COMPILED)
def test_every_kernel_compiles_reads_sixteen_bytes_at_a_time_and_leaves_room_for_another(
    kernel: Any, divergence: str | None, capability: int, tmp_path: Path
) -> None:
    found = compiled(kernel, divergence, capability)
    assert f".target sm_{capability}" in found.asm["ptx"]
    assert "ld.global.v4" in found.asm["ptx"]
    (tmp_path / "kernel.cubin").write_bytes(found.asm["cubin"])
    used = resources(tmp_path / "kernel.cubin")
    assert used["LOCAL"] + used["STACK"] <= SPILLED_BYTES
    assert used["REG"] * NUM_WARPS * THREADS_PER_WARP <= REGISTERS / PROGRAMS


def test_a_target_in_bfloat16_compiles() -> None:
    assert len(compiled(triton_kernels.compare_kernel, "jsd", 90, target="*bf16").asm["cubin"]) > 1000


def test_a_divergence_that_no_branch_computes_does_not_compile() -> None:
    with pytest.raises(CompilationError) as raised:
        compiled(triton_kernels.gradient_kernel, "alpha", 90)
    assert "no branch of _value_and_slope computes this divergence" in str(raised.value.__cause__)
