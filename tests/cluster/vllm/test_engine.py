import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from cluster.config.stages import Dtype, EngineConfig
from cluster.contracts.errors import ModelError
from cluster.vllm.engine import OWNER_VARIABLE, EngineRole, build_engine, gpu_arguments, prepare_environment
from cluster.vllm.token_scoring import Scoring

ROLLOUT = EngineRole(64, prefix_caching=True, tokenizer=True)
TEACHER = EngineRole(64, prefix_caching=True, tokenizer=False, scoring=Scoring())

# Starts a process as vLLM starts an engine's, which comes to its plugins when it may.
OWNER = f"""
import multiprocessing, os, pathlib, sys, time

def engine(may_go_on, is_watching):
    from cluster.vllm.engine import end_with_owner
    while not may_go_on.exists():
        time.sleep(0.05)
    end_with_owner()
    is_watching.touch()
    time.sleep(300)

if __name__ == "__main__":
    os.environ["{OWNER_VARIABLE}"] = str(os.getpid())
    files = [pathlib.Path(name) for name in sys.argv[1:]]
    child = multiprocessing.get_context("spawn").Process(target=engine, args=files)
    child.start()
    print(child.pid, flush=True)
    time.sleep(300)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123, a process file
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("is_late", [False, True], ids=["while it runs", "before it looks"])
def test_an_engine_process_ends_when_its_actor_was_killed(tmp_path: Path, is_late: bool) -> None:
    script, may_go_on, is_watching = tmp_path / "owner.py", tmp_path / "may-go-on", tmp_path / "is-watching"
    script.write_text(OWNER)
    owner = subprocess.Popen([sys.executable, script, may_go_on, is_watching], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    engine = int(owner.stdout.readline())
    if not is_late:
        may_go_on.touch()
        assert wait_until(is_watching.exists)
    assert is_running(engine)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    may_go_on.touch()
    assert wait_until(lambda: not is_running(engine))


def test_an_engine_takes_nine_tenths_of_a_gpu_of_its_own_and_sizes_its_cache_itself() -> None:
    arguments = gpu_arguments(EngineConfig(tensor_parallel=2, max_concurrent_sequences=8), ROLLOUT, is_shared=False)
    assert arguments["gpu_memory_utilization"] == 0.9
    assert "kv_cache_memory_bytes" not in arguments
    assert arguments["distributed_executor_backend"] == "mp"


def test_on_a_shared_gpu_the_cache_has_a_set_size() -> None:
    arguments = gpu_arguments(EngineConfig(gpu_memory_fraction=0.3, kv_cache_gib=2.5), ROLLOUT, is_shared=True)
    assert arguments["gpu_memory_utilization"] == 0.3
    assert arguments["kv_cache_memory_bytes"] == 2_684_354_560
    assert arguments["distributed_executor_backend"] is None


@pytest.mark.parametrize(
    ("role", "setting", "is_eager"),
    [(TEACHER, None, True), (TEACHER, False, False), (ROLLOUT, None, False), (ROLLOUT, True, True)],
)
def test_teachers_compile_nothing_on_a_gpu_unless_they_are_to(
    role: EngineRole, setting: bool | None, is_eager: bool
) -> None:
    engine = EngineConfig(enforce_eager=setting, max_concurrent_sequences=8)
    assert gpu_arguments(engine, role, is_shared=False)["enforce_eager"] is is_eager


@pytest.mark.parametrize(
    ("role", "setting", "is_shared", "sequences"),
    [
        (ROLLOUT, None, False, 1024),
        (ROLLOUT, 8, False, None),  # as set, which is no matter of the GPU
        (ROLLOUT, None, True, None),
        (TEACHER, None, False, None),
    ],
)
def test_a_generator_on_a_gpu_of_its_own_runs_as_many_sequences_as_vllm_takes(
    monkeypatch: pytest.MonkeyPatch, role: EngineRole, setting: int | None, is_shared: bool, sequences: int | None
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    of_h200 = {UsageContext.LLM_CLASS: 1024, UsageContext.OPENAI_API_SERVER: 512}
    monkeypatch.setattr(AsyncEngineArgs, "get_batch_defaults", lambda world_size: ({}, of_h200))
    engine = EngineConfig(max_concurrent_sequences=setting)
    assert gpu_arguments(engine, role, is_shared).get("max_num_seqs") == sequences
    assert engine.concurrent_sequences == (setting or 256)


def test_a_generators_logits_on_a_gpu_are_float32_as_the_learners() -> None:
    role = EngineRole(64, prefix_caching=True, tokenizer=True, float32_head=True)
    assert gpu_arguments(EngineConfig(), role, is_shared=True)["hf_overrides"] == {"head_dtype": "float32"}
    assert "hf_overrides" not in gpu_arguments(EngineConfig(), ROLLOUT, is_shared=True)


def test_rounding_a_samplers_logits_alone_costs_what_the_bar_of_the_gap_would_take_for_a_fault() -> None:
    """One side in bfloat16, as vLLM 0.24 has it: 0.02 nats for logits as random weights give them."""
    logits = torch.randn(400, 30_000, generator=torch.Generator().manual_seed(0)) * 4
    exact, rounded = (values.log_softmax(-1) for values in (logits, logits.bfloat16().float()))
    tokens = exact.exp().multinomial(1, generator=torch.Generator().manual_seed(1))
    gap = (exact - rounded).gather(-1, tokens).abs().mean().item()
    assert 0.015 < gap < 0.03


def test_flashinfers_sampler_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    prepare_environment(EngineConfig())
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0"


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


@pytest.mark.parametrize(("cpu_threads", "of_engine"), [(None, "1"), (3, "3")])
def test_an_engine_on_a_gpu_leaves_the_nodes_cores_to_its_actor(
    monkeypatch: pytest.MonkeyPatch, cpu_threads: int | None, of_engine: str
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform

    def stop(_arguments: AsyncEngineArgs) -> None:
        raise ValueError("this is as far as the test goes")

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", stop)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "9"})
    engine = EngineConfig(cpu_threads=cpu_threads, max_concurrent_sequences=8)
    with pytest.raises(ModelError, match="as far as the test goes"):
        build_engine("nowhere", False, engine, ROLLOUT)
    assert os.environ["OMP_NUM_THREADS"] == of_engine


def test_further_arguments_of_the_run_file_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    def stop(arguments: AsyncEngineArgs) -> None:
        raise ValueError(f"prefers {arguments.performance_mode}, takes {arguments.max_num_seqs}")

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", stop)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    engine = EngineConfig(max_concurrent_sequences=3, extra={"performance_mode": "throughput"})
    with pytest.raises(ModelError, match=r"vLLM cannot serve nowhere: prefers throughput, takes 3$"):
        build_engine("nowhere", False, engine, EngineRole(64, prefix_caching=False, tokenizer=True))
    wrong = EngineConfig(extra={"performance_mod": 1})
    with pytest.raises(ModelError, match=r"vLLM cannot serve nowhere: .*performance_mod"):
        build_engine("nowhere", False, wrong, EngineRole(64, prefix_caching=False, tokenizer=True))


def test_heads_that_vllms_kernels_for_cpus_do_not_have_are_refused_before_an_engine_starts(tmp_path: Path) -> None:
    config = Qwen3Config(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"its heads have 16 dimensions, and on a CPU .* heads of 32, 64, .* on a GPU"):
        build_engine(str(tmp_path), False, EngineConfig(dtype="float32"), EngineRole(64, False, tokenizer=False))
