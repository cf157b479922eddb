"""Holds a vLLM source tree against what this program uses of it: `python -m tests.compat.vllm_names [FOLDER]`.

FOLDER holds the package `vllm`, for example an unpacked wheel; without one, the installed vLLM is read. Sources are
parsed, never imported, so a release can be checked that this machine could not run. Every `from vllm... import ...` of
our own sources is looked up; NEEDS adds what imports do not show: parameters, fields, methods and words.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.compat.vllm_tree import VllmTree, base_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cluster", "rollout_workers", "teacher_workers", "learner")


@dataclass(frozen=True)
class Need:
    """What is used of one class, function or module of vLLM."""

    module: str
    name: str = ""  # of a class or function, "Class.method" too; empty: the module itself
    takes: tuple[str, ...] = ()  # parameters, or a class's fields
    has: tuple[str, ...] = ()  # methods, properties and attributes of a class
    words: tuple[str, ...] = ()  # strings that stand in the module
    spare: tuple[str, ...] = ()  # members that `cluster.vllm.compat` does without where they are missing


ENGINE_ARGUMENTS = (
    "model trust_remote_code dtype tensor_parallel_size max_num_seqs max_num_batched_tokens max_model_len quantization "
    "disable_log_stats max_logprobs logprobs_mode enable_prefix_caching scheduling_policy skip_tokenizer_init "
    "weight_transfer_config worker_extension_cls runner convert hf_overrides gpu_memory_utilization enforce_eager "
    "distributed_executor_backend additional_config kv_cache_memory_bytes enable_chunked_prefill logits_processors "
    "enable_sleep_mode"
)
SAMPLING = (
    "temperature top_p top_k min_p max_tokens seed stop repetition_detection logprobs flat_logprobs detokenize "
    "output_kind extra_args skip_clone"
)
WEIGHT_VERBS = "init_weight_transfer_engine start_weight_update update_weights finish_weight_update"
TRANSFER = "vllm.distributed.weight_transfer"
NEEDS = (
    Need(
        "vllm.engine.arg_utils",
        "AsyncEngineArgs",
        takes=tuple(ENGINE_ARGUMENTS.split()),
        has=("create_engine_config", "get_batch_defaults"),
    ),
    Need("vllm.usage.usage_lib", "UsageContext", has=("LLM_CLASS",)),
    Need("vllm.envs", words=("VLLM_USE_FLASHINFER_SAMPLER",)),
    Need("vllm.config.scheduler", "SchedulerConfig", has=("scheduler_cls", "async_scheduling")),
    Need(
        "vllm.v1.core.sched.scheduler",
        "Scheduler",
        has=("requests", "running", "add_request", "update_from_output", "finish_requests", "cache_config"),
    ),
    Need(
        "vllm.v1.core.sched.scheduler",
        "Scheduler.reset_prefix_cache",
        takes=("reset_running_requests", "reset_connector"),
    ),
    Need(
        "vllm.v1.request",
        "Request",
        has=("status", "cache_salt", "block_hashes", "update_block_hashes", "pooling_params", "_block_hasher"),
    ),
    Need(
        "vllm.v1.request",
        "Request.__init__",
        takes=(
            *("request_id", "prompt_token_ids", "sampling_params", "pooling_params", "client_index", "arrival_time"),
            *("priority", "block_hasher"),
        ),
    ),
    Need(
        "vllm.v1.engine",
        "EngineCoreOutput",
        takes=("request_id", "pooling_output", "prefill_stats"),
    ),
    Need("vllm.v1.engine", "EngineCoreOutputs", takes=("outputs",)),
    Need("vllm.v1.metrics.stats", "PrefillStats", takes=("num_cached_tokens",)),
    Need("vllm.v1.request", "RequestStatus", has=("RUNNING",)),
    Need(
        "vllm.config.vllm",
        "VllmConfig",
        has=("use_v2_model_runner", "model_config", "cache_config", "load_config", "additional_config"),
    ),
    Need("vllm.config.cache", "CacheConfig", has=("block_size",)),
    Need("vllm.config.load", "LoadConfig", has=("load_format",)),
    Need("vllm.config.model", "ModelConfig", has=("logits_processors",), words=("processed_logprobs", "head_dtype")),
    Need("vllm.config.weight_transfer", "WeightTransferConfig", takes=("backend",)),
    Need("vllm.sampling_params", "SamplingParams", takes=tuple(SAMPLING.split())),
    Need("vllm.sampling_params", "RequestOutputKind", has=("FINAL_ONLY", "CUMULATIVE")),
    Need(
        "vllm.sampling_params",
        "RepetitionDetectionParams",
        takes=("max_pattern_size", "min_pattern_size", "min_count"),
    ),
    Need(
        "vllm.pooling_params",
        "PoolingParams",
        takes=("task", "use_activation", "skip_reading_prefix_cache", "extra_kwargs"),
    ),
    Need("vllm.v1.pool.metadata", "PoolingMetadata", takes=("prompt_lens", "pooling_params")),
    Need("vllm.model_executor.layers.pooler.special", "DispatchPooler", has=("poolers_by_task",)),
    Need("vllm.model_executor.layers.pooler.tokwise.poolers", "TokenPooler", has=("pooling", "head")),
    Need("vllm.model_executor.models.registry", "_SUBPROCESS_COMMAND"),
    Need("vllm.model_executor.models.registry", "_run"),
    Need("vllm.tasks", words=("token_embed",)),
    Need("vllm.logprobs", "FlatLogprobs", has=("token_ids", "logprobs")),
    Need(
        "vllm.outputs",
        "CompletionOutput",
        has=("token_ids", "logprobs", "finish_reason"),
        spare=("weight_versions",),
    ),
    Need("vllm.outputs", "RequestOutput", has=("outputs",)),
    Need("vllm.outputs", "PoolingRequestOutput", has=("outputs",)),
    Need("vllm.outputs", "PoolingOutput", has=("data",)),
    Need("vllm.v1.engine", words=("stop", "length", "repetition", "abort")),
    Need(
        "vllm.v1.engine.async_llm",
        "AsyncLLM",
        has=("errored", "shutdown", "resume_generation", "engine_core", "vllm_config", *WEIGHT_VERBS.split()),
        spare=("update_weight_version",),
    ),
    Need("vllm.v1.engine.async_llm", "AsyncLLM.from_vllm_config", takes=("vllm_config", "disable_log_stats")),
    Need(
        "vllm.v1.engine.async_llm", "AsyncLLM.generate", takes=("prompt", "sampling_params", "request_id", "priority")
    ),
    Need("vllm.v1.engine.async_llm", "AsyncLLM.encode", takes=("prompt", "pooling_params", "request_id")),
    Need("vllm.v1.engine.async_llm", "AsyncLLM.sleep", takes=("level",)),
    Need("vllm.device_allocator.cumem", "CuMemAllocator.sleep", takes=("offload_tags",)),
    Need("vllm.v1.engine.async_llm", "AsyncLLM.wake_up"),
    Need("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", takes=("method", "args")),
    Need("vllm.v1.engine.core_client", "AsyncMPClient.pause_scheduler_async", takes=("mode", "clear_cache")),
    Need("vllm.v1.executor.uniproc_executor", "UniProcExecutor"),
    Need("vllm.platforms.interface", "Platform", has=("is_cpu", "is_sleep_mode_available")),
    Need("vllm.plugins", "load_general_plugins", words=("vllm.general_plugins",)),
    Need(
        "vllm.v1.worker.gpu_worker",
        "Worker",
        has=(
            *("weight_transfer_engine", "model_runner", "use_v2_model_runner", "get_model", "wake_up"),
            *WEIGHT_VERBS.split(),
        ),
        spare=("sleep_mode_backend",),
    ),
    Need("vllm.v1.worker.cpu_worker", "CPUWorker", has=("weight_transfer_engine", *WEIGHT_VERBS.split())),
    Need("vllm.v1.sample.logits_processor", "process_dict_updates", takes=("req_entries", "batch_update", "new_state")),
    Need(
        "vllm.v1.sample.logits_processor",
        "LogitsProcessor",
        has=("validate_params", "is_argmax_invariant", "update_state", "apply"),
    ),
    Need(f"{TRANSFER}.base", "WeightTransferInitRequest", takes=("init_info",)),
    Need(f"{TRANSFER}.base", "WeightTransferUpdateRequest", takes=("update_info",)),
    Need(
        f"{TRANSFER}.base",
        "WeightTransferEngine",
        has=("model", "parse_init_info", "parse_update_info"),
        spare=("model_config",),
    ),
    Need(f"{TRANSFER}.factory", "WeightTransferEngineFactory", has=("_registry", "register_engine")),
    Need(
        f"{TRANSFER}.nccl_engine",
        "NCCLWeightTransferInitInfo",
        takes=("master_address", "master_port", "rank_offset", "world_size"),
        spare=("packed", "packed_buffer_size_bytes", "packed_num_buffers"),
    ),
    Need(
        f"{TRANSFER}.nccl_engine",
        "NCCLWeightTransferUpdateInfo",
        takes=("names", "dtype_names", "shapes"),
        spare=("packed", "packed_buffer_size_bytes", "packed_num_buffers"),
    ),
    Need(f"{TRANSFER}.nccl_engine", "NCCLWeightTransferEngine", has=("init_transfer_engine", "model_update_group")),
    Need(f"{TRANSFER}.ipc_engine", "IPCWeightTransferInitInfo", spare=("packed",)),
    Need(
        f"{TRANSFER}.ipc_engine",
        "IPCWeightTransferUpdateInfo",
        takes=("names", "dtype_names", "shapes", "ipc_handles", "tensor_sizes"),
        spare=("packed",),
    ),
    Need(f"{TRANSFER}.ipc_engine", "IPCWeightTransferEngine", has=("parse_update_info",)),
    Need("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator", has=("disabled", "destroy", "comm")),
    Need("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator.__init__", takes=("group", "device")),
    Need("vllm.distributed.utils", "StatelessProcessGroup", takes=("rank", "world_size", "store")),
    Need("vllm.distributed.device_communicators.pynccl", "PyNcclCommunicator.broadcast", takes=("tensor", "src")),
    Need(
        "vllm.model_executor.layers.vocab_parallel_embedding",
        "UnquantizedEmbeddingMethod.process_weights_after_loading",
        takes=("layer",),
    ),
    Need("vllm.model_executor.model_loader.reload", "initialize_layerwise_reload", takes=("model",)),
    Need("vllm.model_executor.model_loader.reload.types", "LayerReloadingInfo", has=("load_numel", "can_load")),
    Need(
        "vllm.model_executor.model_loader.reload.layerwise",
        "finalize_layerwise_processing",
        takes=("model", "model_config"),
    ),
)


def main() -> int:
    """Prints what a tree lacks and what the program does without; fails when anything is lacking."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else installed_vllm()
    tree = VllmTree(folder)
    lacking = lacking_in(tree)
    for line in [*lacking, *spared_in(tree)]:
        print(line)
    print(f"vLLM in {folder}: {len(lacking)} of what is used is lacking")
    return 1 if lacking else 0


def installed_vllm() -> Path:
    """Returns the folder that holds the installed vLLM, without importing it."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        sys.exit("vLLM is not installed; name a folder that holds its sources")
    return Path(found.origin).parents[1]


def lacking_in(tree: VllmTree) -> list[str]:
    """Returns one sentence for each thing that the program uses and the tree does not have."""
    imports = [f"{where} imports {name} from {module}, which has none" for where, module, name in unmet_imports(tree)]
    methods = [f"{where} lacks {name}, which {module} wants" for where, module, name in unfilled_methods(tree)]
    return imports + methods + unmet_needs(tree)


def unmet_needs(tree: VllmTree) -> list[str]:
    """Returns one sentence for each thing in NEEDS that the tree does not have."""
    lacking = []
    for need in NEEDS:
        what = f"{need.module}.{need.name}".rstrip(".")
        if not tree.has(need.module, need.name):
            lacking.append(f"{what} is not there")
            continue
        lacking += [
            f"{what} takes no {name!r}" for name in need.takes if name not in tree.takes(need.module, need.name)
        ]
        lacking += [f"{what} has no {name!r}" for name in need.has if name not in tree.members(need.module, need.name)]
        lacking += [f"{what} knows no {word!r}" for word in need.words if word not in tree.words(need.module)]
    return lacking


def spared_in(tree: VllmTree) -> list[str]:
    """Returns one sentence for each thing that the tree does not have and `cluster.vllm.compat` does without."""
    imports = [
        f"{module} has no {name!r}, and cluster.vllm.compat does without"
        for _, source in our_sources()
        for guarded in _guarded(source)
        for _, module, name in _unmet(tree, guarded.body)
    ]
    members = [
        f"{need.module}.{need.name} has no {name!r}, and cluster.vllm.compat does without"
        for need in NEEDS
        for name in need.spare
        if tree.has(need.module, need.name) and name not in tree.members(need.module, need.name)
    ]
    return imports + members


def our_sources() -> Iterator[tuple[str, ast.Module]]:
    """Yields the path and the syntax of each of our files."""
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def unfilled_methods(tree: VllmTree) -> Iterator[tuple[str, str, str]]:
    """Yields (our class, vLLM's class, method) of methods without which our class cannot be made."""
    for path, source in our_sources():
        origins = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in ast.walk(source)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
            for alias in node.names
        }
        for node in ast.walk(source):
            if not isinstance(node, ast.ClassDef):
                continue
            own = {statement.name for statement in node.body if isinstance(statement, ast.FunctionDef)}
            for module, name in (origins[found] for found in map(base_name, node.bases) if found in origins):
                for method in sorted(tree.abstract(module, name) - own):
                    yield f"{path}: {node.name}", f"{module}.{name}", method


def unmet_imports(tree: VllmTree) -> Iterator[tuple[str, str, str]]:
    """Yields (our file, module, name) of imports that fail there and have no other to take their place."""
    for path, source in our_sources():
        spared = set()
        for guarded in _guarded(source):
            spared |= {id(inner) for statement in guarded.body for inner in ast.walk(statement)}
            if not any(True for _ in _unmet(tree, guarded.body)):
                # What the handlers import instead is not needed here.
                spared |= {id(inner) for handler in guarded.handlers for inner in ast.walk(handler)}
        for node, module, name in _unmet(tree, source.body):
            if id(node) not in spared:
                yield path, module, name


def _guarded(source: ast.Module) -> list[ast.Try]:
    """Returns the statements that have another import for one that fails."""
    tries = [node for node in ast.walk(source) if isinstance(node, ast.Try)]
    return [found for found in tries if any(_catches_import_error(handler) for handler in found.handlers)]


def _unmet(tree: VllmTree, body: list[ast.stmt]) -> Iterator[tuple[ast.AST, str, str]]:
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm":
                for alias in node.names:
                    if not tree.has(node.module, alias.name):
                        yield node, node.module, alias.name


def _catches_import_error(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.type, ast.Name) and handler.type.id == "ImportError"


if __name__ == "__main__":
    sys.exit(main())
