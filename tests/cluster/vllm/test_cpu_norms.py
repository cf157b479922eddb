"""vLLM's norm kernels compute on a CPU what its chain of torch's operations does."""

import pytest
import torch

from cluster.vllm.cpu_norms import PROVIDER, kernel_priorities, register

ir = pytest.importorskip("vllm.ir", reason="vLLM 0.24 has no choice of kernels")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    register()  # each of vLLM's processes may do so twice


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 64), (96, 4, 16), (7, 128)])
def test_norms_equal_those_of_torchs_operations(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    norm, of_sum = ir.ops.rms_norm, ir.ops.fused_add_rms_norm
    expected = norm.impls["native"].impl_fn(x, weight, 1e-6)
    expected_of_sum = of_sum.impls["native"].impl_fn(x, residual, weight, 1e-6)
    with norm.set_priority([PROVIDER, "native"]), of_sum.set_priority([PROVIDER, "native"]):
        assert norm.dispatch(x, weight, 1e-6).provider == PROVIDER
        torch.testing.assert_close(norm(x, weight, 1e-6), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert of_sum.dispatch(x, residual, weight, 1e-6).provider == PROVIDER
        found = of_sum(x, residual, weight, 1e-6)
    torch.testing.assert_close(found, expected_of_sum, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_parts_of_a_wider_tensor_are_read_where_they_lie() -> None:
    wide = torch.randn(5, 3 * 32)
    query = wide[:, 32:64].view(5, 2, 16)
    weight = torch.ones(16)
    with ir.ops.rms_norm.set_priority([PROVIDER, "native"]):
        found = ir.ops.rms_norm(query, weight, 1e-6)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(query, (16,), weight, 1e-6), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("width", "weight_dtype", "variance_size"),
    [(24, torch.bfloat16, None), (32, torch.float32, None), (32, torch.bfloat16, 16)],
    ids=["width", "dtype", "part"],
)
def test_what_the_kernels_cannot_do_stays_with_torch(
    width: int, weight_dtype: torch.dtype, variance_size: int | None
) -> None:
    x, weight = torch.randn(2, width).bfloat16(), torch.ones(width, dtype=weight_dtype)
    with ir.ops.rms_norm.set_priority([PROVIDER, "native"]):
        assert ir.ops.rms_norm.dispatch(x, weight, 1e-6, variance_size).provider == "native"
        assert ir.ops.rms_norm.dispatch(x, None, 1e-6).provider == "native"


def test_engines_ask_for_the_kernels_where_vllm_knows_them() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    chosen = AsyncEngineArgs(model="none", **kernel_priorities()).ir_op_priority
    assert chosen.rms_norm == chosen.fused_add_rms_norm == [PROVIDER]
