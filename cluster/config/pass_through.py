"""Lets a run file set what Preceptor has no name for: vLLM's engine arguments, DeepSpeed's configuration entries.

What Preceptor sets itself is refused by name, and so are names that the installed vLLM or DeepSpeed does not have.
These are read from their sources, for importing either takes seconds.
"""

import ast
import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError

_GPUS = "its GPUs are engine.tensor_parallel; set that"
_SAME_MODEL = "student and engines would have different models; give a folder that has it"
# vLLM's argument -> what sets it.
OWNED_BY_ENGINES = {
    "model": "it is the section's model; set that",
    "tokenizer": "engines take token ids; the tokenizer is the model's",
    "revision": _SAME_MODEL,
    "hf_overrides": _SAME_MODEL,
    "trust_remote_code": "set trust_remote_code of the student or teacher",
    "dtype": "set engine.dtype",
    "tensor_parallel_size": "set engine.tensor_parallel",
    "pipeline_parallel_size": _GPUS,
    "data_parallel_size": _GPUS,
    "distributed_executor_backend": "it follows from engine.tensor_parallel",
    "max_num_seqs": "set engine.max_concurrent_sequences",
    "max_num_batched_tokens": "set engine.max_batched_tokens",
    "max_model_len": "it follows from the longest prompt and rollout.max_completion_tokens; set those",
    "gpu_memory_utilization": "set engine.gpu_memory_fraction",
    "kv_cache_memory_bytes": "set engine.kv_cache_gib",
    "enforce_eager": "set engine.enforce_eager",
    "quantization": "set engine.quantization",
    "enable_sleep_mode": "set rollout.engine.sleep, or the slots of teachers",
    "enable_prefix_caching": "scores and weight updates depend on it",
    "enable_chunked_prefill": "it follows from the device",
    "scheduling_policy": "the oldest step comes first",
    "scheduler_cls": "rollout.keep_cache_on_update chooses it",
    "logprobs_mode": "the loss needs the probabilities that tokens were sampled with",
    "max_logprobs": "it follows from the objective",
    "logits_processors": "the objective's candidates and classes of stop ids need it",
    "runner": "it follows from what the engine is for",
    "convert": "it follows from what the engine is for",
    "skip_tokenizer_init": "it follows from what the engine is for",
    "weight_transfer_config": "set weight_sync.transport",
    "worker_extension_cls": "the weight sync needs it",
    "disable_log_stats": "Preceptor has metrics of its own",
    "hf_token": "config.json would keep it; set HF_TOKEN in the environment",
}
# Entry of DeepSpeed's configuration -> what sets it.
OWNED_BY_LEARNER = {
    "train_batch_size": "batches come as they are scored; set learner.micro_batch_tokens",
    "train_micro_batch_size_per_gpu": "set learner.micro_batch_tokens",
    "gradient_accumulation_steps": "it follows from learner.micro_batch_tokens and the step's tokens",
    "gradient_clipping": "set learner.max_gradient_norm",
    "bf16": "set learner.dtype",
    "fp16": "set learner.dtype",
    "amp": "set learner.dtype",
    "torch_autocast": "set learner.dtype",
    "data_types": "gradients add up in float32",
    "communication_data_type": "gradients add up in float32",
    "optimizer": "set learner.betas, epsilon and weight_decay",
    "scheduler": "set learner.learning_rate, lr_schedule and warmup_steps",
    "zero_optimization.stage": "set learner.zero_stage",
    "zero_optimization.offload_optimizer.device": "set learner.offload_optimizer",
    "zero_optimization.offload_param.device": "set learner.offload_parameters",
}
_LITERAL = re.compile(r"[\"'](\w+)[\"']")


def check_pass_through(config: Config) -> None:
    """Raise ConfigError for an entry that is Preceptor's own, or that vLLM or DeepSpeed does not have."""
    engines = {"rollout": config.rollout.engine}
    engines |= {f"teachers.{name}": teacher.engine for name, teacher in config.teachers.items()}
    for section, engine in engines.items():
        if engine.extra:
            _check(f"{section}.engine.extra", engine.extra, OWNED_BY_ENGINES, engine_arguments(), "vLLM")
    if config.learner.deepspeed:
        known = deepspeed_entries()
        _check("learner.deepspeed", config.learner.deepspeed, OWNED_BY_LEARNER, known, "DeepSpeed")


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, tables within tables too; where both have a value, the second's.

    Example:
        >>> merged({"a": 1, "zero": {"stage": 2}}, {"zero": {"overlap_comm": True}})
        {'a': 1, 'zero': {'stage': 2, 'overlap_comm': True}}
    """
    both = {**ours, **theirs}
    for name in ours.keys() & theirs.keys():
        if isinstance(ours[name], Mapping) and isinstance(theirs[name], Mapping):
            both[name] = merged(ours[name], theirs[name])
    return both


def engine_arguments() -> set[str]:
    """Return the names of the installed vLLM's engine arguments; none where it is not installed."""
    source = _source_folder("vllm") / "engine/arg_utils.py"
    classes = ast.parse(source.read_text(encoding="utf-8")).body if source.is_file() else []
    return {
        field.target.id
        for section in classes
        if isinstance(section, ast.ClassDef) and section.name in ("EngineArgs", "AsyncEngineArgs")
        for field in section.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def deepspeed_entries() -> set[str]:
    """Return the words that the installed DeepSpeed reads its configuration with; its entries' names are among them."""
    folder = _source_folder("deepspeed")
    sources = [path for name in ("constants.py", "config.py") for path in folder.rglob(name)]
    return {entry for source in sources for entry in _LITERAL.findall(source.read_text(encoding="utf-8"))}


def _check(path: str, entries: Mapping[str, Any], owned: Mapping[str, str], known: Collection[str], where: str) -> None:
    for name in _dotted(entries):
        if name in owned:
            raise ConfigError(f"{path}.{name}: Preceptor sets this entry of {where}: {owned[name]}; remove it here")
    for name in entries:
        if known and name not in known:
            nearest = difflib.get_close_matches(name, known, 1, cutoff=0)[0]
            raise ConfigError(f"{path}.{name}: the installed {where} has no such entry; the nearest is '{nearest}'")
    try:
        kept = msgspec.json.decode(msgspec.json.encode(entries))
    except (TypeError, OverflowError, ValueError):
        kept = None
    if kept != entries:
        raise ConfigError(f"{path}: holds a value that config.json cannot keep; use texts, numbers, lists and tables")


def _dotted(entries: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield the names of all entries, those within tables with dots."""
    for name, value in entries.items():
        yield before + name
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{before}{name}.")


def _source_folder(package: str) -> Path:
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path("/nonexistent")
