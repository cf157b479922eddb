import os
import subprocess
import sys
import time

import pytest

from cluster.contracts.errors import ModelError
from cluster.contracts.pools import Dtype, EngineConfig
from cluster.vllm_runtime import (
    OWNER_CHECK_SECONDS,
    OWNER_VARIABLE,
    EngineRole,
    build_engine,
    gpu_arguments,
    prepare_environment,
)

CHILD = "from cluster.vllm_runtime import end_with_owner; end_with_owner(); import time; time.sleep(60)"
OWNER = f"""
import os, subprocess, sys, time
os.environ["{OWNER_VARIABLE}"] = str(os.getpid())
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123, a process file
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def test_an_engine_process_ends_soon_after_its_actor_was_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    time.sleep(2 * OWNER_CHECK_SECONDS)
    assert is_running(child)
    owner.kill()
    owner.wait()
    deadline = time.monotonic() + 10 * OWNER_CHECK_SECONDS
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)


def test_an_engine_takes_nine_tenths_of_a_gpu_of_its_own_and_sizes_its_cache_itself() -> None:
    arguments = gpu_arguments(EngineConfig(tensor_parallel=2), is_shared=False)
    assert arguments["gpu_memory_utilization"] == 0.9
    assert "kv_cache_memory_bytes" not in arguments
    assert arguments["distributed_executor_backend"] == "mp"


def test_on_a_shared_gpu_the_cache_has_a_set_size() -> None:
    arguments = gpu_arguments(EngineConfig(gpu_memory_fraction=0.3, kv_cache_gib=2.5), is_shared=True)
    assert arguments["gpu_memory_utilization"] == 0.3
    assert arguments["kv_cache_memory_bytes"] == 2_684_354_560
    assert arguments["distributed_executor_backend"] is None


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "ieee"), ("bfloat16", None)])
def test_float32_is_not_rounded_to_tf32_by_triton(
    monkeypatch: pytest.MonkeyPatch, dtype: Dtype, precision: str | None
) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    prepare_environment(EngineConfig(dtype=dtype))
    assert os.environ.get("TRITON_F32_DEFAULT") == precision


@pytest.mark.parametrize(("enforce_eager", "setting"), [(True, "1"), (None, "1"), (False, None)])
def test_on_a_cpu_nothing_is_compiled_for_an_eager_engine(
    monkeypatch: pytest.MonkeyPatch, enforce_eager: bool | None, setting: str | None
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    seen: list[str | None] = []

    def stop(_arguments: AsyncEngineArgs) -> None:
        seen.append(os.environ.get("TORCH_COMPILE_DISABLE"))
        raise ValueError("this is as far as the test goes")

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", stop)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: True)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    role = EngineRole(64, prefix_caching=False, tokenizer=True)
    with pytest.raises(ModelError, match="as far as the test goes"):
        build_engine("nowhere", False, EngineConfig(dtype="float32", enforce_eager=enforce_eager), role)
    assert seen == [setting]
