"""Computes from the models' configurations and a run's settings what one worker of every pool puts on its GPU.

These are sums of what must be there (weights, cache, optimizer) and of the largest arrays beside it, in GiB. Without a
GPU the same is in the node's memory. `memory_plan.py` chooses with it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.config.run_config import Config
from cluster.config.stages import GENERATING, EngineConfig, RefreshConfig
from cluster.models.model_size import STUDENT, ModelSize
from cluster.vllm.engine import BYTES_PER_GIB, DEFAULT_CACHE_GIB, OWN_GPU_FRACTION
from cluster.weight_sync.transports import choose

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CONTEXT_GIB = 0.5  # of each process on a GPU: its CUDA context
WORKSPACE_GIB = 0.5  # of each: cuBLAS, and what its caching allocator holds in pieces
GRAPHS_GIB = 1.0  # of an engine that compiles: CUDA graphs
COMMUNICATION_GIB = 0.5  # of a process that others reach by NCCL
SLEEPING_GIB = CONTEXT_GIB + WORKSPACE_GIB  # what an engine keeps while it sleeps
PACKAGES_GIB = 1.0  # of each process without a GPU: what it imports
SPARE_GIB = 0.5  # of a GPU that belongs to one worker: the driver's own
# On a GPU, on a CPU: float32 logits alive at once, as `learner/model/completion_head.py` and
# `cluster/models/token_scores.py` cut them. Of the learner's there are three: logits, their gradient, and
# what the loss computes, and another for each model whose whole distribution is compared; of a teacher's two.
LEARNED_LOGITS = {True: 1 << 28, False: 1 << 26}
SCORED_LOGITS, SCORED_TOKENS = {True: 1 << 27, False: 1 << 23}, 128
MOST_SEQUENCES = 1024  # at once, where vLLM chooses
SAMPLED_BYTES = 12  # of one logit of a sampled token: itself, its log-probability and a copy, in float32
LARGE_BUCKET, SMALL_BUCKET = 500_000_000, 100_000_000  # of ZeRO, in values; the first is DeepSpeed's own
SMALL_GPU_BYTES = 32 << 30
GATHERED_VALUES = 1_000_000_000  # of parameters that ZeRO stage 3 has whole at once


@dataclass(frozen=True)
class WorkerMemory:
    """Holds what lies on the GPU of one worker, or on each of its GPUs, in GiB."""

    pool: str
    weights: float
    activations: float
    logits: float
    context: float  # of all its processes, with their workspaces
    optimizer: float = 0.0  # float32 masters, AdamW's moments, averages that teachers have
    gradients: float = 0.0  # in float32
    head: float = 0.0  # a teacher's LM head; of the learner, the head's gradient and the teachers' heads
    cache: float = 0.0  # keys and values
    buffers: float = 0.0  # weights under way, ZeRO's buckets, hidden states of a micro-batch
    available: float | None = None  # None: the node's memory, which all workers share
    engine: float = 0.0  # of these, what vLLM counts of its own: the least that `gpu_memory_fraction` must be
    cache_tokens: int | None = None  # None: it has no cache
    longest_tokens: int = 0  # of one sequence

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def resident(self) -> float:
        """Return what is there between two of its calls."""
        return self.weights + self.optimizer + self.gradients + self.context

    @property
    def sequences(self) -> float | None:
        """Return how many of the longest sequences the cache holds at once."""
        return None if self.cache_tokens is None else self.cache_tokens / self.longest_tokens

    @property
    def has_sequence(self) -> bool:
        """Return whether a cache, if it has one, holds a sequence of the longest kind."""
        return self.sequences is None or self.sequences >= 1

    @property
    def fits(self) -> bool:
        return (self.available is None or self.total <= self.available + 1e-6) and self.has_sequence


PARTS = ("weights", "optimizer", "gradients", "activations", "head", "logits", "cache", "buffers", "context")


@dataclass(frozen=True)
class Lengths:
    """Holds the tokens of the longest sequences."""

    student: int
    of_teacher: Callable[[str], int] | None = None  # of those that read longer prompts
    rollout: int | None = None  # of the rollout engines, where they score for a teacher that does

    def of(self, name: str) -> int:
        return self.student if self.of_teacher is None else self.of_teacher(name)


def estimate(
    config: Config, sizes: Mapping[str, ModelSize], lengths: Lengths, gpu_gib: float | None
) -> dict[str, WorkerMemory]:
    """Return, by pool, what a worker takes, on GPUs of so many GiB or, with None, on a CPU.

    `sizes` has the student's under `STUDENT` and those of the teachers that have engines under their names.
    """
    memory = {"rollout": rollout_memory(config, sizes[STUDENT], lengths.rollout or lengths.student, gpu_gib)}
    for name in config.teachers:
        if name in sizes:
            memory[f"teacher-{name}"] = teacher_memory(config, name, sizes[name], lengths.of(name), gpu_gib)
    learner = learner_memory(config, sizes, lengths.student, gpu_gib)
    if learner.available is not None and yields_to_learner(config):
        given = config.rollout.num_workers * (memory["rollout"].weights + memory["rollout"].cache)
        learner = replace(learner, available=learner.available + given)
    return memory | {"learner": learner}


def yields_to_learner(config: Config) -> bool:
    """Return whether rollout engines sleep on a shared GPU whenever the learner has a micro-batch on it."""
    return config.ray.share_gpu and config.rollout.engine.sleep and config.rollout.max_staleness == 0


def most_sequences(config: Config, engine: EngineConfig | None = None) -> int:
    """Return how many sequences may run at once in an engine that samples; without one, in a rollout engine.

    On a GPU of its own vLLM chooses, if none are set.
    """
    engine = engine or config.rollout.engine
    return engine.max_concurrent_sequences or (engine.concurrent_sequences if config.ray.share_gpu else MOST_SEQUENCES)


def rollout_memory(config: Config, size: ModelSize, longest: int, gpu_gib: float | None) -> WorkerMemory:
    """Return what an engine that generates takes; where it has GPUs of its own, weights come through a buffer."""
    engine = config.rollout.engine
    logits = (
        (most_sequences(config) if gpu_gib is not None else engine.concurrent_sequences)
        * size.vocabulary
        * SAMPLED_BYTES
    )
    on_gpu = gpu_gib is not None
    # Of an update: the bucket as it came, and the largest layer, which vLLM loads beside the one that it keeps.
    layer = _gib(size.head_parameters * DTYPE_BYTES[engine.dtype] / max(1, engine.tensor_parallel))
    beside = {
        "buffers": _transfer_gib(config, size) + layer if on_gpu else 0.0,
        "context": COMMUNICATION_GIB if on_gpu and choose(config, True)[1] == "nccl" else 0.0,
    }
    return _engine_memory(config, "rollout", engine, size, longest, gpu_gib, beside, logits=_gib(logits))


def teacher_memory(config: Config, name: str, size: ModelSize, longest: int, gpu_gib: float | None) -> WorkerMemory:
    """Return what an engine that scores takes; its worker has the LM head and logits, and vLLM counts both.

    Others of its slot sleep meanwhile. One that writes is as a rollout worker's, whose weights never change.
    """
    teacher, on_gpu = config.teachers[name], gpu_gib is not None
    if teacher.backend == GENERATING:
        sequences = most_sequences(config, teacher.engine) if on_gpu else teacher.engine.concurrent_sequences
        sampled = _gib(sequences * size.vocabulary * SAMPLED_BYTES)
        return _engine_memory(config, f"teacher-{name}", teacher.engine, size, longest, gpu_gib, {}, logits=sampled)
    vocabulary = size.vocabulary / max(1, teacher.engine.tensor_parallel)
    logits = 2 * max(SCORED_LOGITS[on_gpu], SCORED_TOKENS * vocabulary) * 4
    [others] = [len(names) - 1 for names in config.scorer_groups.values() if name in names]
    beside = {"context": others * SLEEPING_GIB if on_gpu else 0.0}
    return _engine_memory(
        config, f"teacher-{name}", teacher.engine, size, longest, gpu_gib, beside, logits=_gib(logits), scores=True
    )


def _engine_memory(
    config: Config,
    pool: str,
    engine: EngineConfig,
    size: ModelSize,
    longest: int,
    gpu_gib: float | None,
    beside: Mapping[str, float],
    logits: float,
    scores: bool = False,
) -> WorkerMemory:
    """Return what lies inside an engine and, of the same GPU, `beside` it, which vLLM does not know of."""
    ranks, value = max(1, engine.tensor_parallel), DTYPE_BYTES[engine.dtype]
    # Of a scoring engine, a copy of a tied head; vLLM's model has no other one.
    head = _gib(size.head_parameters * value / ranks) if scores else 0.0
    weights = _gib(size.weight_bytes(value, engine.quantization is not None) / ranks) - (0.0 if size.is_tied else head)
    # A batch of tokens in a feed-forward layer: both halves of it, their product, the residual and what is normed.
    tokens = max(engine.max_batched_tokens, longest) if gpu_gib else longest
    experts = 2 * size.experts_per_token * size.width
    activations = _gib(tokens * (3 * size.inner_width / ranks + 4 * size.width + experts) * value)
    context = PACKAGES_GIB
    if gpu_gib is not None:
        is_eager = scores if engine.enforce_eager is None else engine.enforce_eager
        context = CONTEXT_GIB + WORKSPACE_GIB + (0.0 if is_eager else GRAPHS_GIB)
        context += COMMUNICATION_GIB if ranks > 1 else 0.0
    inside, outside = weights + head + activations + logits + context, sum(beside.values())
    available, cache = None, engine.kv_cache_gib or DEFAULT_CACHE_GIB
    if gpu_gib is not None and config.ray.share_gpu:  # its fraction is for all of it
        available = gpu_gib * (engine.gpu_memory_fraction or 0.0)
        cache = engine.kv_cache_gib or max(0.0, available - inside - outside)
    elif gpu_gib is not None:  # the cache takes what the rest leaves of the engine's fraction
        available = gpu_gib
        cache = max(0.0, gpu_gib * own_fraction(engine, gpu_gib, outside) - inside)
    return WorkerMemory(
        pool,
        weights,
        activations,
        logits,
        context + beside.get("context", 0.0),
        head=head,
        cache=cache,
        buffers=beside.get("buffers", 0.0),
        available=available,
        engine=inside + cache,
        cache_tokens=int(cache * BYTES_PER_GIB / cache_bytes_per_token(engine, size)),
        longest_tokens=longest,
    )


def own_fraction(engine: EngineConfig, gpu_gib: float, outside: float) -> float:
    """Return the fraction of a GPU of its own that an engine takes, so that what is beside it has room."""
    if engine.gpu_memory_fraction is not None:
        return engine.gpu_memory_fraction
    return max(0.01, min(OWN_GPU_FRACTION, int(1000 * (gpu_gib - outside - SPARE_GIB) / gpu_gib) / 1000))


def cache_bytes_per_token(engine: EngineConfig, size: ModelSize) -> float:
    """Return what one token takes of each GPU's cache; ranks beyond the number of a layer's heads have copies."""
    is_short = str(engine.extra.get("kv_cache_dtype", "")).startswith("fp8")
    value = 1 if is_short else DTYPE_BYTES[engine.dtype]
    return size.kv_values_per_token * value / min(max(1, engine.tensor_parallel), size.kv_heads)


def learner_memory(config: Config, sizes: Mapping[str, ModelSize], longest: int, gpu_gib: float | None) -> WorkerMemory:
    """Return what a rank takes: ZeRO shards the optimizer from stage 1, gradients from 2, weights from 3."""
    learner, size, on_gpu = config.learner, sizes[STUDENT], gpu_gib is not None
    value, ranks, stage = DTYPE_BYTES[learner.dtype], learner.num_workers, learner.zero_stage
    weights = 0.0 if learner.offload_parameters == "cpu" and on_gpu else size.parameters * value
    # Masters and moments; and what each teacher has that took the student's weights some steps ago, or their average.
    kept = sum(isinstance(teacher.refresh, RefreshConfig) for teacher in config.teachers.values())
    masters = 0 if stage == 0 and value == 4 else 4
    optimizer = 0 if learner.offload_optimizer == "cpu" and on_gpu else masters + 8 + 4 * kept
    # No more than a step has; a longer trajectory has a micro-batch of its own.
    rows = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
    tokens = max(min(learner.forward_tokens, rows * longest), longest)
    chunk = min(LEARNED_LOGITS[on_gpu], tokens * size.vocabulary) * 4
    models = config.objective.needs.models if config.objective.needs.hidden else ()
    compared = {config.scoring_teacher(model, route) for model in models for route in config.routes} & sizes.keys()
    heads = sum(sizes[name].head_parameters * DTYPE_BYTES[config.teachers[name].engine.dtype] for name in compared)
    states = max((sizes[name].width for name in compared), default=0) * len(models) * tokens * 2
    context, available = PACKAGES_GIB, None
    if gpu_gib is not None:
        is_reached = ranks > 1 or choose(config, True)[1] == "nccl"
        context = CONTEXT_GIB + WORKSPACE_GIB + (COMMUNICATION_GIB if is_reached else 0.0)
        fraction = (learner.gpu_memory_fraction or 0.0) if config.ray.share_gpu else 1.0
        available = gpu_gib * fraction
    return WorkerMemory(
        "learner",
        _gib(weights / (ranks if stage == 3 else 1)),
        _gib(activation_bytes(size, tokens, value, learner.recomputes)),
        _gib((3 + len(models)) * chunk),
        context,
        optimizer=_gib(size.parameters * optimizer / ranks),
        gradients=_gib(size.parameters * 4 / (ranks if stage >= 2 else 1)),
        head=_gib(size.head_parameters * (4 + value) + heads),
        buffers=_gib(states) + _learner_buffers(config, size, gpu_gib),
        available=available,
        longest_tokens=longest,
    )


def activation_bytes(size: ModelSize, tokens: int, value_bytes: int, recomputes: bool) -> float:
    """Return what autograd keeps of a micro-batch, and what the layer that goes backward has besides.

    With `recomputes` each layer's input is kept, and one layer whole; else all of them are.
    """
    layer = size.saved_bytes_per_token(value_bytes)
    kept = size.width * value_bytes * size.layers + layer if recomputes else layer * size.layers
    last_norm = (4 + value_bytes) * size.width
    backward = (3 * size.inner_width + 4 * size.width) * value_bytes
    return tokens * (kept + last_norm + backward)


def _learner_buffers(config: Config, size: ModelSize, gpu_gib: float | None) -> float:
    """Return, on a GPU, the buffer of weights under way, DeepSpeed's bucket of gradients and its float32 copy.

    Stage 3 has some parameters whole besides.
    """
    learner = config.learner
    if gpu_gib is None or learner.zero_stage == 0:
        return 0.0 if gpu_gib is None else _transfer_gib(config, size)
    value, settings = DTYPE_BYTES[learner.dtype], _zero_settings(learner.deepspeed)
    bucket = int(settings.get("reduce_bucket_size", bucket_values(size.parameters, int(gpu_gib * BYTES_PER_GIB))))
    gathered = int(settings.get("stage3_max_live_parameters", GATHERED_VALUES)) if learner.zero_stage == 3 else 0
    copied = 0 if value == 4 else min(size.parameters, bucket) * 4
    zero = _gib(bucket * value + copied + min(size.parameters, gathered) * value)
    return zero + _transfer_gib(config, size)


def bucket_values(num_values: int, gpu_bytes: int | None) -> int:
    """Return how many gradients, or weights, travel at once: DeepSpeed's number, or what the model or the GPU allows.

    DeepSpeed takes memory for a whole bucket, in the weights' dtype and in float32: 3 GB for its own number.
    """
    return min(num_values, SMALL_BUCKET if gpu_bytes is not None and gpu_bytes < SMALL_GPU_BYTES else LARGE_BUCKET)


def _zero_settings(deepspeed: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = deepspeed.get("zero_optimization", {})
    return settings if isinstance(settings, Mapping) else {}


def _transfer_gib(config: Config, size: ModelSize) -> float:
    """Return the buffer that weights pass through on a GPU: of one bucket, or of the largest tensor; 0: none does."""
    if choose(config, True)[1] not in ("nccl", "ipc"):
        return 0.0
    largest = size.head_parameters * DTYPE_BYTES[config.rollout.engine.dtype]
    return _gib(max(config.weight_sync.bucket_bytes, largest))


def _gib(num_bytes: float) -> float:
    return num_bytes / BYTES_PER_GIB
