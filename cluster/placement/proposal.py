"""Chooses dtypes, sizes of pools, caches and micro-batches of a new run, so that its workers fit the machine."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config.draft import TEACHER, Draft
from cluster.config.run_config import Config
from cluster.contracts.errors import ConfigError, PlacementError
from cluster.models.model_size import STUDENT, ModelSize
from cluster.placement.gpus import visible_gpus
from cluster.placement.memory import Lengths
from cluster.placement.memory_plan import plan_memory
from cluster.placement.memory_report import MemoryPlan
from cluster.placement.placement import NodeResources

SMALL_PARAMETERS = 10_000_000  # a student that is so small learns in float32 without being slower
MIN_CACHE_GIB = 0.25
GIB = 1 << 30
GPUS_OF_A_NODE = 8  # of machines that are described only
NO_BFLOAT16 = "this CPU has no bfloat16 products, and engines take two to four times as long with it"
# What is planned with of a GPU that is described only: one called 80 or 141 GB has 79.6 or 139.8 GiB.
NAMED_SHARE = 0.97
# By estimate, not measured: to write a token takes a GPU, which reads the weights for some hundred sequences at once,
# as long as to read so many; and no less than a model of so many parameters takes to read one, for the engine's Python
# writes 20,000 tokens a second where a GPU reads with 4e14 operations.
TOKENS_READ, LEAST_PARAMETERS = 4, 10_000_000_000


@dataclass(frozen=True)
class Machine:
    """Describes what the run will have."""

    cpus: int
    memory_gib: float
    gpus: int
    gpu_gib: float  # of each
    is_named: bool = False  # whether that is what somebody calls it, and not what it was found to have

    @classmethod
    def read(cls, gpus: int | None, gpu_gib: float | None) -> "Machine":
        """Describe this machine, or one with so many GPUs of so many GiB each."""
        cpus = len(os.sched_getaffinity(0))
        memory, is_named = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, gpu_gib is not None
        if (gpus is not None and gpus < 0) or (gpu_gib is not None and not 0 < gpu_gib < math.inf):
            raise ConfigError(f"--gpus {gpus} --gpu-memory {gpu_gib}: expected 0 or more GPUs, of more than 0 GiB each")
        if gpus is None or (gpus and gpu_gib is None):
            here = visible_gpus()
            gpus = len(here) if gpus is None else gpus
            if gpus and gpu_gib is None:
                if not here:
                    raise ConfigError(f"--gpus {gpus}: this machine has none to look at; add --gpu-memory GIB")
                gpu_gib = min(here)
        return cls(cpus, memory, gpus, gpu_gib or 0.0, is_named)

    @property
    def planned_gib(self) -> float:
        """Return what a GPU can be counted on to have."""
        return self.gpu_gib * NAMED_SHARE if self.is_named else self.gpu_gib

    def nodes(self, share_gpu: bool) -> list[NodeResources]:
        """Return the machine as nodes of Ray: a shared GPU is the only one of its node, others come by eights."""
        if not self.gpus:
            return [NodeResources(float(self.cpus), 0)]
        full, rest = divmod(1 if share_gpu else self.gpus, GPUS_OF_A_NODE)
        sizes = [GPUS_OF_A_NODE] * full + [rest] * bool(rest)
        return [NodeResources(float(max(self.cpus, 4 * gpus)), gpus) for gpus in sizes]

    def describe(self) -> str:
        gpus = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.gpu_gib:.0f} GiB" if self.gpus else "no GPU"
        return f"{gpus}, {self.cpus} CPU cores, {self.memory_gib:.0f} GiB of memory"


def warning_of_dtype(config: Config, on_gpu: bool) -> str | None:
    """Return what is slow about the engines' dtype, for a run file that was written for another machine."""
    if on_gpu or config.rollout.engine.dtype != "bfloat16":
        return None
    from cluster.models.lm_head import lacks_bfloat16

    if not lacks_bfloat16():
        return None
    return f"warning: rollout.engine.dtype = 'bfloat16', and {NO_BFLOAT16}; use float32, in all three stages"


def choose_hardware(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> MemoryPlan:
    """Complete a draft whose longest sequences have so many tokens, and return what its workers take of memory.

    `sizes` lacks a teacher that is served elsewhere.

    Raises:
        PlacementError: the models do not fit.
    """
    if not machine.gpus:
        _choose_for_cpu(draft, sizes, longest, machine)
    elif machine.gpus < len(sizes) + 1:
        _choose_for_one_gpu(draft, sizes, longest, machine)
    else:
        _choose_for_gpus(draft, sizes, longest, machine)
    draft.drop_defaults()
    plan = _plan(draft, sizes, longest, machine)
    plan.refuse()
    needed = sum(one.total for one in plan.workers.values())
    if not machine.gpus and needed > machine.memory_gib:
        raise PlacementError(
            f"the run needs about {needed:.1f} GiB of memory, and this machine has {machine.memory_gib:.1f}; take a "
            "larger machine (--gpus, --gpu-memory) or smaller models"
        )
    return plan


def _plan(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> MemoryPlan:
    return plan_memory(draft.config(), sizes, Lengths(longest), machine.planned_gib if machine.gpus else None)


def _choose_for_cpu(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> None:
    from cluster.models.lm_head import lacks_bfloat16  # torch, which `preceptor plan` does without

    in_float32 = True
    if sizes[STUDENT].parameters <= SMALL_PARAMETERS:
        draft.set("learner.dtype", "float32", "a student of this size is as fast in it")
    elif lacks_bfloat16():
        draft.set("learner.dtype", "float32", NO_BFLOAT16)
    else:
        in_float32 = False
    if in_float32:
        draft.set("rollout.engine.dtype", "float32")
        if TEACHER in sizes:
            draft.set(f"teachers.{TEACHER}.engine.dtype", "float32")
    draft.set("learner.micro_batch_tokens", max(2048, longest))
    rows = draft.value("prompts.prompts_per_step")
    for name in sizes:
        section = "rollout" if name == STUDENT else f"teachers.{name}"
        needed = rows * longest * sizes[name].kv_values_per_token * (4 if in_float32 else 2) / GIB
        cache = min(_up(needed, MIN_CACHE_GIB), _down(machine.memory_gib / 8, MIN_CACHE_GIB))
        why = f"the {rows} sequences of a step, if all had {longest} tokens, take {needed:.2g} GiB"
        draft.set(f"{section}.engine.kv_cache_gib", cache, why)


def _choose_for_one_gpu(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> None:
    """Put all on one GPU, as the memory plan divides it, the optimizer in host memory only if nothing else fits."""
    sharing = "student, teacher and learner" if TEACHER in sizes else "student and learner"
    draft.set("ray.share_gpu", True, f"{sharing} share the first GPU of {machine.gpus}")
    draft.set("rollout.engine.max_concurrent_sequences", draft.value("prompts.prompts_per_step"), "all of a step")
    first = plan = _plan(draft, sizes, longest, machine)
    if plan.fault is not None:
        draft.set("learner.offload_optimizer", "cpu", "else the GPU would not hold the run")
        plan = _plan(draft, sizes, longest, machine)
        if plan.fault is not None:
            first.refuse()
    _write_learner(draft, plan)
    draft.set("learner.gpu_memory_fraction", plan.config.learner.gpu_memory_fraction)
    engines = {("rollout", "rollout"): plan.config.rollout.engine}
    if TEACHER in sizes:
        engines[f"teachers.{TEACHER}", f"teacher-{TEACHER}"] = plan.config.teachers[TEACHER].engine
    for (section, pool), engine in engines.items():
        worker = plan.workers[pool]
        draft.set(f"{section}.engine.gpu_memory_fraction", engine.gpu_memory_fraction, f"about {worker.total:.1f} GiB")
        why = f"{worker.cache_tokens:,} tokens, {worker.sequences or 0:,.0f} of the longest sequences"
        draft.set(f"{section}.engine.kv_cache_gib", engine.kv_cache_gib, why)


def _choose_for_gpus(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> None:
    """Give the learner and the teacher as few GPUs as hold them, and the rollout pool, the slowest, the rest."""
    ranks, width = max(1, machine.gpus // 4), 1 if TEACHER in sizes else 0
    while True:
        draft.set("learner.num_workers", ranks)
        if _fits(draft, sizes, longest, machine, "learner") or 2 * ranks >= machine.gpus:
            break
        ranks *= 2
    if not _fits(draft, sizes, longest, machine, "learner"):
        draft.set("learner.offload_optimizer", "cpu", "else a rank would not fit")
    while width:
        draft.set(f"teachers.{TEACHER}.engine.tensor_parallel", width)
        if _fits(draft, sizes, longest, machine, f"teacher-{TEACHER}") or 2 * width >= machine.gpus:
            break
        width *= 2
    _write_learner(draft, _plan(draft, sizes, longest, machine))
    draft.set("learner.num_workers", ranks)
    replicas, why = _scoring_replicas(sizes, machine.gpus - ranks, width) if width else (0, "")
    if replicas > 1:
        draft.set(f"teachers.{TEACHER}.num_workers", replicas, why)
    left = machine.gpus - ranks - replicas * width
    draft.set("rollout.num_workers", max(1, left), "the pool has all other GPUs")


def _scoring_replicas(sizes: Mapping[str, ModelSize], gpus: int, width: int) -> tuple[int, str]:
    """Return how many engines of `width` GPUs read as fast as the rest of the GPUs write, and why."""
    reading = _parameters_read(sizes[TEACHER])
    writing = max(TOKENS_READ * _parameters_read(sizes[STUDENT]), LEAST_PARAMETERS)

    def slowest(replicas: int) -> float:
        return max(writing / max(1, gpus - replicas * width), reading / (replicas * width))

    why = f"by estimate it reads a token in {reading / writing:.2g} of the time in which the student writes one"
    return min(range(1, max(2, gpus // width)), key=slowest), why


def _parameters_read(size: ModelSize) -> float:
    """Return what one token is multiplied with; of a mixture of experts, those that it uses."""
    layer = 2 * size.width * (size.query_width + size.kv_width) + 3 * size.width * size.inner_width
    return size.layers * layer + size.head_parameters


def _fits(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine, pool: str) -> bool:
    return _plan(draft, sizes, longest, machine).workers[pool].fits


def _write_learner(draft: Draft, plan: MemoryPlan) -> None:
    learner, worker = plan.config.learner, plan.workers["learner"]
    why = f"a rank takes about {worker.total:.1f} of {worker.available or 0.0:.1f} GiB"
    draft.set("learner.micro_batch_tokens", learner.forward_tokens, why)
    draft.set("learner.gradient_checkpointing", learner.recomputes)


def _up(value: float, unit: float) -> float:
    return round(math.ceil(value / unit - 1e-9) * unit, 4)


def _down(value: float, unit: float) -> float:
    return round(math.floor(value / unit + 1e-9) * unit, 4)
