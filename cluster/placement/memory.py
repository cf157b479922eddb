"""Estimates from the sizes of the models what one worker of every pool takes of its GPU, or of a node's memory.

These are sums of what must be there (weights, cache, optimizer) and of the largest arrays beside it. Allocators and
kernels take some more, for which `RESERVE_GIB` stands.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.config.run_config import Config
from cluster.config.stages import EngineConfig, RefreshConfig
from cluster.models.model_size import ModelSize
from cluster.vllm.engine import BYTES_PER_GIB, OWN_GPU_FRACTION

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RESERVE_GIB = 1.0  # of each process: CUDA context and graphs, or imported packages on a CPU; fragments
# On a GPU, on a CPU: a chunk of logits, what is computed from it, and the target's.
LEARNED_LOGITS_GIB = {True: 3.0, False: 0.75}
SCORED_LOGITS_GIB = {True: 1.0, False: 0.1}
STUDENT = "student"  # key of its size, beside teachers' names


@dataclass(frozen=True)
class WorkerMemory:
    """Holds the estimate for one worker of a pool, in GiB."""

    pool: str
    weights: float
    state: float  # engines: the key-value cache; learner: gradients, float32 masters and AdamW's moments
    working: float  # activations, logits and what a process takes by itself
    available: float | None = None  # None: the node's memory, which all workers share
    sequences: float | None = None  # engines: of the longest kind that the cache holds at once

    @property
    def total(self) -> float:
        return self.weights + self.state + self.working

    def fault(self) -> str | None:
        """Say why the worker cannot work; None if nothing is known against it."""
        if self.available is not None and self.total > self.available:
            return f"{self.pool}: a worker needs about {self.total:.1f} GiB of a GPU and has {self.available:.1f}"
        if self.sequences is not None and self.sequences < 1:
            return f"{self.pool}: {self.state:.2f} GiB of cache hold no sequence of the longest kind"
        return None

    def describe(self) -> str:
        state = "cache" if self.sequences is not None else "optimizer and gradients"
        parts = f"weights {self.weights:.2g}, {state} {self.state:.2g}, working {self.working:.2g}"
        of = "" if self.available is None else f" of {self.available:.1f}"
        longest = "" if self.sequences is None else f"; {self.sequences:,.0f} of the longest sequences at once"
        return f"{self.total:.1f}{of} GiB ({parts}){longest}"


def estimate(
    config: Config,
    sizes: Mapping[str, ModelSize],
    max_model_len: int,
    gpu_gib: float | None,
    scoring_model_len: Callable[[str], int] | None = None,
) -> list[WorkerMemory]:
    """Return what a worker of each pool takes, on GPUs of so many GiB or, with None, on a CPU.

    `sizes` has the student's under `STUDENT` and those of the teachers that have engines under their names;
    `scoring_model_len` gives the context of teachers that read longer prompts than the student.
    """
    memory = [_engine("rollout", config, config.rollout.engine, sizes[STUDENT], max_model_len, gpu_gib)]
    for name, teacher in config.teachers.items():
        if name in sizes:
            tokens = max_model_len if scoring_model_len is None else scoring_model_len(name)
            memory.append(_engine(f"teacher-{name}", config, teacher.engine, sizes[name], tokens, gpu_gib, True))
    return [*memory, _learner(config, sizes[STUDENT], gpu_gib)]


def _engine(
    pool: str,
    config: Config,
    engine: EngineConfig,
    size: ModelSize,
    max_model_len: int,
    gpu_gib: float | None,
    scores: bool = False,
) -> WorkerMemory:
    """Return the estimate for an engine; one that scores has an LM head and logits beside it."""
    ranks = max(1, engine.tensor_parallel)
    value = DTYPE_BYTES[engine.dtype]
    weights = _gib(size.parameters * (1 if engine.quantization or size.is_quantized else value) / ranks)
    tokens = max(engine.max_batched_tokens, max_model_len) if gpu_gib else max_model_len
    activations = tokens * (2 * size.inner_width / ranks + 4 * size.width) * value
    logits = 0 if scores else engine.concurrent_sequences * size.vocabulary * 2 * DTYPE_BYTES["float32"]
    inside = RESERVE_GIB + _gib(activations + logits)
    outside = _gib(size.head_parameters * value) + SCORED_LOGITS_GIB[gpu_gib is not None] if scores else 0.0
    cache, available = engine.kv_cache_gib, None
    if gpu_gib is not None and config.ray.share_gpu:
        available = gpu_gib * (engine.gpu_memory_fraction or 0.0)
    elif gpu_gib is not None:  # the cache takes what the rest leaves of the engine's fraction
        available = gpu_gib
        cache = max(0.0, gpu_gib * (engine.gpu_memory_fraction or OWN_GPU_FRACTION) - weights - inside)
    per_sequence = _gib(size.kv_values_per_token * value / ranks) * max_model_len
    return WorkerMemory(pool, weights, cache, inside + outside, available, cache / per_sequence)


def _learner(config: Config, size: ModelSize, gpu_gib: float | None) -> WorkerMemory:
    """Return the estimate for a rank: ZeRO shards the optimizer from stage 1, gradients from 2, weights from 3."""
    learner = config.learner
    value, ranks, stage = DTYPE_BYTES[learner.dtype], learner.num_workers, learner.zero_stage
    weights = size.parameters * value / (ranks if stage == 3 else 1)
    gradients = size.parameters * 4 / (ranks if stage >= 2 else 1)
    # Masters and moments; and what each teacher has that took the student's weights some steps ago, or their average.
    kept = sum(isinstance(teacher.refresh, RefreshConfig) for teacher in config.teachers.values())
    is_offloaded = learner.offload_optimizer == "cpu" and gpu_gib is not None
    optimizer = 0 if is_offloaded else size.parameters * (12 + 4 * kept) / ranks
    layer = (6 * size.width + 4 * size.inner_width + 3 * size.width + 4 * size.kv_width) * value
    activations = size.width * value * size.layers + layer if learner.gradient_checkpointing else layer * size.layers
    head_gradient = size.head_parameters * 4
    working = RESERVE_GIB + LEARNED_LOGITS_GIB[gpu_gib is not None]
    working += _gib(learner.micro_batch_tokens * activations + head_gradient)
    available = None
    if gpu_gib is not None:
        available = gpu_gib * (learner.gpu_memory_fraction if config.ray.share_gpu else 1.0)
    return WorkerMemory("learner", _gib(weights), _gib(gradients + optimizer), working, available)


def _gib(num_bytes: float) -> float:
    return num_bytes / BYTES_PER_GIB
