"""Plans the memory of a run's GPUs: chooses what its file leaves open, shows what lies where, refuses what cannot fit.

Open are the engines' fractions, the caches of a GPU that all share, the learner's share of it, and its micro-batches.
Choosing again from a configuration that holds the choices changes nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.config.run_config import Config
from cluster.models.model_size import STUDENT, ModelSize
from cluster.placement.memory import (
    SPARE_GIB,
    Lengths,
    cache_bytes_per_token,
    estimate,
    learner_memory,
    most_sequences,
    own_fraction,
    yields_to_learner,
)
from cluster.placement.memory_report import (
    LEAST_TOKENS,
    SHARED_LIMIT,
    MemoryPlan,
    describe_choices,
    engines_of,
    has_workers,
    shared_fault,
    sum_of_shares,
    with_engines,
    worker_fault,
)
from cluster.vllm.engine import BYTES_PER_GIB

# Tokens of a micro-batch on a GPU, and whether activations are computed again: the first that fits is taken.
MICRO_BATCHES = ((16384, False), (8192, False), (8192, True), (4096, True), (LEAST_TOKENS, True))
CACHE_PARTS = tuple(part / 20 for part in range(20, -1, -1))  # of what caches would like beyond what they need
FIRST_PART = 0.25  # of it, when the learner chooses
TEACHER_SEQUENCES = 16  # that a teacher on a shared GPU reads at once
MIN_CACHE_GIB = 0.25
UNIT = 1000  # shares are in thousandths


def plan_memory(config: Config, sizes: Mapping[str, ModelSize], lengths: Lengths, gpu_gib: float | None) -> MemoryPlan:
    """Choose for GPUs of so many GiB; with None nothing, for a CPU.

    `sizes` has the student's under `STUDENT` and those of the teachers that have engines under their names.
    """
    if gpu_gib is None:
        return MemoryPlan(config, estimate(config, sizes, lengths, None))
    if config.ray.share_gpu:
        planned = _share(config, sizes, lengths, gpu_gib)
    else:
        workers = estimate(config, sizes, lengths, gpu_gib)
        fractions = {
            pool: own_fraction(engine, gpu_gib, workers[pool].total - workers[pool].engine)
            for pool, engine in engines_of(config, sizes).items()
        }
        planned = with_engines(config, {pool: {"gpu_memory_fraction": one} for pool, one in fractions.items()})
        planned = with_micro_batch(planned, sizes, lengths.student, gpu_gib, gpu_gib - SPARE_GIB)

    def share(opened: Config) -> Config:
        return _share(opened, sizes, lengths, gpu_gib)

    workers = estimate(planned, sizes, lengths, gpu_gib)
    faults = [
        worker_fault(planned, sizes, lengths, one, gpu_gib, share)
        for pool, one in workers.items()
        if has_workers(planned, pool)  # a replay may need no engines
    ]
    if config.ray.share_gpu:
        faults.insert(0, shared_fault(planned, workers, gpu_gib, share))
    choices = tuple(describe_choices(config, planned, workers))
    return MemoryPlan(planned, workers, gpu_gib, choices, next(filter(None, faults), None))


def with_micro_batch(
    config: Config, sizes: Mapping[str, ModelSize], longest: int, gpu_gib: float, limit_gib: float
) -> Config:
    """Set the learner's micro-batch where it is open: the first that lets a rank fit, or else the least."""
    tried = config
    for tokens, recomputes in _micro_batches(config):
        learner = replace(config.learner, micro_batch_tokens=tokens, gradient_checkpointing=recomputes)
        tried = replace(config, learner=learner)
        if learner_memory(tried, sizes, longest, gpu_gib).total <= limit_gib:
            break
    return tried


def _micro_batches(config: Config) -> list[tuple[int, bool]]:
    tokens, recomputes = config.learner.micro_batch_tokens, config.learner.gradient_checkpointing
    if recomputes is not None:
        several = sorted({size for size, _ in MICRO_BATCHES}, reverse=True)
        return [(size, recomputes) for size in ([tokens] if tokens else several)]
    return list(MICRO_BATCHES) if tokens is None else [(tokens, False), (tokens, True)]


@dataclass(frozen=True)
class _SharedEngine:
    """Says how much of a shared GPU one engine needs, and would like."""

    fixed: float  # GiB, without its cache
    least: float  # GiB of cache
    wanted: float
    fraction: float | None  # that is set

    def cache(self, part: float, gpu_gib: float) -> float:
        """Return the GiB of its cache; `part` of what it would like beyond the least, or what a set fraction leaves."""
        if self.fraction is not None and self.least < self.wanted:
            return max(0.01, _down(self.fraction * gpu_gib - self.fixed, 100))
        return self.least + part * (self.wanted - self.least)

    def share(self, part: float, gpu_gib: float) -> float:
        return self.fraction or _up((self.fixed + self.cache(part, gpu_gib)) / gpu_gib, UNIT)


def _share(config: Config, sizes: Mapping[str, ModelSize], lengths: Lengths, gpu_gib: float) -> Config:
    """Give the learner what it needs beside engines with small caches, and the caches what is left then."""
    engines = _shared_engines(config, sizes, lengths, gpu_gib)
    workers = estimate(config, sizes, lengths, gpu_gib)
    given = 0.0  # to the learner while the rollout engines sleep
    if yields_to_learner(config):
        given = config.rollout.num_workers * (
            workers["rollout"].weights + engines["rollout"].cache(FIRST_PART, gpu_gib)
        )

    def needed(part: float) -> float:
        return sum_of_shares(config, {pool: one.share(part, gpu_gib) for pool, one in engines.items()})

    share = config.learner.gpu_memory_fraction or SHARED_LIMIT - needed(FIRST_PART)
    planned = with_micro_batch(config, sizes, lengths.student, gpu_gib, share * gpu_gib + given)
    if config.learner.gpu_memory_fraction is None:
        learner = learner_memory(planned, sizes, lengths.student, gpu_gib)
        share = min(1.0, _up(max(learner.resident, learner.total - given) / gpu_gib, UNIT))
        planned = replace(planned, learner=replace(planned.learner, gpu_memory_fraction=share))
    part = next((part for part in CACHE_PARTS if needed(part) + share <= SHARED_LIMIT + 1e-9), 0.0)
    chosen = {
        pool: {"gpu_memory_fraction": min(1.0, one.share(part, gpu_gib)), "kv_cache_gib": one.cache(part, gpu_gib)}
        for pool, one in engines.items()
    }
    return with_engines(planned, chosen)


def _shared_engines(
    config: Config, sizes: Mapping[str, ModelSize], lengths: Lengths, gpu_gib: float
) -> dict[str, _SharedEngine]:
    rows = config.prompts.prompts_per_step * config.rollout.samples_per_prompt
    rows = min(math.ceil(rows / max(1, config.rollout.num_workers)), most_sequences(config))
    engines = {}
    for pool, worker in estimate(config, sizes, lengths, gpu_gib).items():
        if pool == "learner":
            continue
        engine, name = engines_of(config, sizes)[pool], pool.removeprefix("teacher-")
        size = sizes[STUDENT] if pool == "rollout" else sizes[name]
        sequence = cache_bytes_per_token(engine, size) * worker.longest_tokens / BYTES_PER_GIB
        wanted = _up(max(MIN_CACHE_GIB, sequence * (rows if pool == "rollout" else TEACHER_SEQUENCES)), 100)
        least = _up(max(MIN_CACHE_GIB, sequence), 100)
        if engine.kv_cache_gib is not None:
            least = wanted = engine.kv_cache_gib
        fixed = worker.total - worker.cache
        engines[pool] = _SharedEngine(fixed, min(least, wanted), wanted, engine.gpu_memory_fraction)
    return engines


def _up(value: float, unit: int) -> float:
    return math.ceil(value * unit - 1e-9) / unit


def _down(value: float, unit: int) -> float:
    return math.floor(value * unit + 1e-9) / unit
