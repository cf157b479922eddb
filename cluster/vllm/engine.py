"""Builds a vLLM engine; the one place that knows vLLM's arguments, its environment and how CPU differs from GPU.

vLLM reads its environment when it is first imported, so `prepare_environment` comes before any `import vllm`.
"""

import multiprocessing
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cluster.actors.worker_output import last_error, own_output
from cluster.config.stages import EngineConfig
from cluster.contracts.errors import ModelError
from cluster.nodes.preloaded_python import PYTHON_VARIABLE
from cluster.vllm.plugins import provide_plugins

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

    from cluster.vllm.token_scoring import Scoring

OWNER_VARIABLE = "PRECEPTOR_ENGINE_OWNER"  # process id of the actor
SCORING_KEY = "preceptor_scoring"  # of a Scoring in vLLM's additional configuration, which its workers have
SHARED_GPU_VARIABLE = "PRECEPTOR_SHARED_GPU"  # set for actors whose engine shares its GPU
OWN_GPU_FRACTION = 0.9  # of a GPU that an engine has to itself, at most; the rest is for what vLLM does not count
DEFAULT_CACHE_GIB = 1.0  # where nothing says how large it is
BYTES_PER_GIB = 1 << 30
# Runs the model inside the engine core's own process. vLLM's default on CPU is a worker process per engine, which costs
# a second start-up, the memory of a second interpreter, and two process switches per decoding step.
IN_PROCESS_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
KEEPING_SCHEDULER = "cluster.vllm.keep_cache.Keeping"  # the first part of two names, as vLLM names classes
BATCH_SCHEDULER = "cluster.vllm.batch_requests.Batch"
# Turns a causal LM into an embedder of tokens, which `token_scoring.py` lets score them; "model" keeps its hidden
# states in its own dtype, where vLLM would cast them to float32.
POOLING_ARGUMENTS = {"runner": "pooling", "convert": "embed", "hf_overrides": {"head_dtype": "model"}}


@dataclass(frozen=True)
class LayersToSend:
    """Says which layers of its model an engine's model returns behind the last hidden states (`layer_states.py`)."""

    layers: tuple[int, ...]  # from 1, of the engine's own model; the last is after the final norm
    bank: str | None = None  # file of a projection bank whose teacher has these layers; None: states as they are
    digest: str = ""  # of that bank


@dataclass(frozen=True)
class EngineRole:
    """Says what an engine is for."""

    max_model_len: int  # prompt + completion, and 1 more where it generates, in tokens
    prefix_caching: bool
    tokenizer: bool  # without one the engine can neither find stop strings nor know the EOS token
    scoring: "Scoring | None" = None  # score tokens instead of generating
    sleeps: bool = False  # whether it is to give its GPU memory back for a time
    keeps_cache: bool = False  # whether running requests keep their keys and values when the weights change
    float32_head: bool = False  # on a GPU: compute logits in float32, as the learner does; vLLM 0.24 cannot
    priorities: bool = False  # when not all requests fit, those of the lowest priority run first
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs"  # processed: after temperature, top-p
    max_logprobs: int = 1
    weight_transfer_backend: str | None = None  # None: the weights never change
    worker_extension: str | None = None  # class whose methods are added to vLLM's workers, as "module.Class"
    # In the order in which they work, each for vLLM's model runners V1 and V2, as "module:Class".
    logits_processors: tuple[tuple[str, str], ...] = ()


def prepare_environment(engine: EngineConfig) -> None:
    """Set what vLLM and OpenMP read from the environment; the engine's subprocesses inherit it.

    Without `cpu_threads` the worker uses OMP_NUM_THREADS, which Ray sets to the actor's CPUs, or else all its cores.
    """
    threads = engine.cpu_threads or int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # spinning threads starve the other workers of a shared node
    # Bound threads of two engines would share the same cores while others idle: every engine starts at core 0.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Where it finds nvcc, FlashInfer compiles its sampler for minutes, and no request of ours can use it: ours have
    # seeds and want log-probabilities.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if engine.dtype == "float32":
        # On a GPU vLLM attends in float32 with Triton alone, which would round what it multiplies to TF32's 10 bits.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    os.environ[OWNER_VARIABLE] = str(os.getpid())
    provide_plugins()


def end_with_owner() -> None:
    """End this process when the actor that started it is gone; vLLM calls it in each of its processes as a plugin.

    An actor that is killed outright cannot end its engine, which would go on holding memory, or a whole GPU. It may be
    gone already when this is called: an engine's process imports for seconds before it comes here.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and os.environ.get(OWNER_VARIABLE) == str(parent.pid):
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)  # the main thread may be deep inside a kernel and would not see a signal


def build_engine(model: str, trust_remote_code: bool, engine: EngineConfig, role: EngineRole) -> "AsyncLLM":
    """Start an engine and its process, in a running event loop; raise ModelError if vLLM refuses the model."""
    prepare_environment(engine)
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    from cluster.vllm.compat import (
        VLLMError,
        early_logits_processors,
        inspect_models_in,
        late_logits_processors,
        scheduler_name,
    )
    from cluster.vllm.cpu_norms import kernel_priorities

    if (python := os.environ.get(PYTHON_VARIABLE)) is not None:
        multiprocessing.set_executable(python)
        inspect_models_in(python)
    is_cpu = current_platform.is_cpu()
    arguments = _common_arguments(engine, role) | _platform_arguments(engine, role, is_cpu) | engine.extra
    if is_cpu and arguments["enforce_eager"]:
        # vLLM compiles a function of its sampler all the same, and a C++ compiler runs six seconds for it.
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
        arguments = kernel_priorities() | arguments
    if not is_cpu:
        # For the engine's process, which computes on the GPU; OpenMP has read the actor's own number already.
        os.environ["OMP_NUM_THREADS"] = str(engine.cpu_threads or 1)
    if role.scoring is not None and role.scoring.layers is not None:
        arguments["enforce_eager"] = True  # a compiled model does not call the hooks on its layers
    arguments["enable_sleep_mode"] = role.sleeps and current_platform.is_sleep_mode_available()
    arguments |= early_logits_processors(role.logits_processors)
    try:
        args = AsyncEngineArgs(model=model, trust_remote_code=trust_remote_code, **arguments)
        config = args.create_engine_config()
        if is_cpu:
            _check_heads_for_cpu(config.model_config)
        late_logits_processors(config, role.logits_processors)
        if role.keeps_cache or role.scoring is not None:
            prefix = KEEPING_SCHEDULER if role.keeps_cache else BATCH_SCHEDULER
            scheduling = config.scheduler_config
            scheduling.scheduler_cls = scheduler_name(prefix, scheduling.async_scheduling)
        return AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
    except (VLLMError, TypeError, ValueError, OSError, RuntimeError) as error:  # TypeError: of engine.extra
        printed = last_error(own_output())  # by the engine's process; what this one has is seldom the reason
        reason = f"{error}; its last error: {printed}" if printed else str(error)
        raise ModelError(f"vLLM cannot serve {model}: {reason}") from error


def _check_heads_for_cpu(model: Any) -> None:
    """Raise ValueError where vLLM's attention on CPU has no kernel for the model; it would end inside a step."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    size, sizes = model.get_head_size(), CPUAttentionBackend.get_supported_head_sizes()
    if not model.use_mla and size not in sizes:
        raise ValueError(
            f"its heads have {size} dimensions, and on a CPU vLLM attends with heads of {', '.join(map(str, sizes))}; "
            "take a model with such heads, or run it on a GPU"
        )


def _common_arguments(engine: EngineConfig, role: EngineRole) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig

    backend = role.weight_transfer_backend
    return {
        "dtype": engine.dtype,
        "tensor_parallel_size": engine.tensor_parallel,
        "max_num_seqs": engine.concurrent_sequences,
        "max_num_batched_tokens": max(engine.max_batched_tokens, role.max_model_len),
        "max_model_len": role.max_model_len,
        "quantization": engine.quantization,
        "disable_log_stats": True,
        "max_logprobs": role.max_logprobs,
        "logprobs_mode": role.logprobs_mode,
        "enable_prefix_caching": role.prefix_caching,
        "scheduling_policy": "priority" if role.priorities else "fcfs",
        "skip_tokenizer_init": not role.tokenizer,
        "weight_transfer_config": WeightTransferConfig(backend=backend) if backend else None,
        "worker_extension_cls": role.worker_extension or "",
        **({} if role.scoring is None else scoring_arguments(role.scoring)),
    }


def scoring_arguments(scoring: "Scoring") -> dict[str, Any]:
    """Return vLLM's arguments of an engine that scores tokens."""
    return POOLING_ARGUMENTS | {"additional_config": {SCORING_KEY: msgspec.to_builtins(scoring)}}


def _platform_arguments(engine: EngineConfig, role: EngineRole, is_cpu: bool) -> dict[str, Any]:
    if not is_cpu:
        return gpu_arguments(engine, role, is_shared=SHARED_GPU_VARIABLE in os.environ)
    return {
        "kv_cache_memory_bytes": int((engine.kv_cache_gib or DEFAULT_CACHE_GIB) * BYTES_PER_GIB),
        "enforce_eager": engine.enforce_eager is not False,
        # A seeded request whose prompt is split ends vLLM 0.32's engine on CPU: it rewinds the generator by an offset
        # that only CUDA generators have.
        "enable_chunked_prefill": False,
        "distributed_executor_backend": "mp" if engine.tensor_parallel > 1 else IN_PROCESS_EXECUTOR,
    }


def gpu_arguments(engine: EngineConfig, role: EngineRole, is_shared: bool) -> dict[str, Any]:
    """Return vLLM's arguments that only count on a GPU, of the engine's own or shared with others."""
    # A teacher reads long prompts and decodes nothing: compiling and CUDA graphs would cost it a minute and a GiB.
    is_eager = role.scoring is not None if engine.enforce_eager is None else engine.enforce_eager
    arguments: dict[str, Any] = {
        "gpu_memory_utilization": engine.gpu_memory_fraction or OWN_GPU_FRACTION,
        "enforce_eager": is_eager,
        # Inside a Ray actor vLLM would otherwise ask Ray for more actors to hold the other ranks.
        "distributed_executor_backend": "mp" if engine.tensor_parallel > 1 else None,
    }
    if is_shared:
        # vLLM would measure what is left for the cache, and take what the others allocate meanwhile for its own; it
        # ends when they free something. With a given size, the fraction is only what must be free when it starts.
        arguments["kv_cache_memory_bytes"] = int((engine.kv_cache_gib or DEFAULT_CACHE_GIB) * BYTES_PER_GIB)
    elif engine.max_concurrent_sequences is None and role.scoring is None:
        arguments["max_num_seqs"] = _vllms_sequences(engine.tensor_parallel)
    if role.float32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}  # rounded logits alone differ by 0.02 nats from these
    return arguments


def _vllms_sequences(tensor_parallel: int) -> int:
    """Return how many sequences vLLM runs at once on this GPU if no number is set."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    _, sequences = AsyncEngineArgs.get_batch_defaults(tensor_parallel)
    return sequences[UsageContext.LLM_CLASS]
