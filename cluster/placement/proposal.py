"""Chooses dtypes, sizes of pools, caches and micro-batches of a new run, so that its workers fit the machine."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config.draft import TEACHER, Draft
from cluster.contracts.errors import ConfigError, PlacementError
from cluster.models.model_size import ModelSize
from cluster.placement.memory import STUDENT, WorkerMemory, estimate
from cluster.placement.placement import NodeResources

SMALL_PARAMETERS = 10_000_000  # a student that is so small learns in float32 without being slower
# Tokens of a micro-batch on a GPU, and whether activations are computed again: the first that fits is taken.
MICRO_BATCHES = ((16384, False), (8192, False), (8192, True), (4096, True), (2048, True))
SHARED_LIMIT = 0.95  # of a GPU that all stages share
MIN_CACHE_GIB = 0.25
TEACHER_SEQUENCES = 16  # that a teacher on a shared GPU reads at once
GIB = 1 << 30
GPUS_OF_A_NODE = 8  # of machines that are described only


@dataclass(frozen=True)
class Machine:
    """Describes what the run will have."""

    cpus: int
    memory_gib: float
    gpus: int
    gpu_gib: float  # of each

    @classmethod
    def read(cls, gpus: int | None, gpu_gib: float | None) -> "Machine":
        """Describe this machine, or one with so many GPUs of so many GiB each."""
        cpus = len(os.sched_getaffinity(0))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        if (gpus is not None and gpus < 0) or (gpu_gib is not None and not 0 < gpu_gib < math.inf):
            raise ConfigError(f"--gpus {gpus} --gpu-memory {gpu_gib}: expected 0 or more GPUs, of more than 0 GiB each")
        if gpus is None or (gpus and gpu_gib is None):
            import torch

            here = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = here if gpus is None else gpus
            if gpus and gpu_gib is None:
                if not here:
                    raise ConfigError(f"--gpus {gpus}: this machine has none to look at; add --gpu-memory GIB")
                gpu_gib = torch.cuda.get_device_properties(0).total_memory / GIB
        return cls(cpus, memory, gpus, gpu_gib or 0.0)

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


def choose_hardware(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> list[WorkerMemory]:
    """Complete a draft whose longest sequences have so many tokens, and return what its workers take of memory.

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
    memory = estimate(draft.config(), sizes, longest, machine.gpu_gib if machine.gpus else None)
    faults = [fault for one in memory if (fault := one.fault())]
    needed = sum(one.total for one in memory)
    if not machine.gpus and needed > machine.memory_gib:
        faults = [f"the run needs about {needed:.1f} GiB of memory, and this machine has {machine.memory_gib:.1f}"]
    if faults:
        raise PlacementError(f"{'; '.join(faults)}; take a larger machine (--gpus, --gpu-memory) or smaller models")
    return memory


def _choose_for_cpu(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> None:
    is_small = sizes[STUDENT].parameters <= SMALL_PARAMETERS
    if is_small:
        draft.set("learner.dtype", "float32", "a student of this size is as fast in it")
        draft.set("rollout.engine.dtype", "float32")
        draft.set(f"teachers.{TEACHER}.engine.dtype", "float32")
    draft.set("learner.micro_batch_tokens", max(2048, longest))
    rows = draft.value("prompts.prompts_per_step")
    for section, name in (("rollout", STUDENT), (f"teachers.{TEACHER}", TEACHER)):
        needed = rows * longest * sizes[name].kv_values_per_token * (4 if is_small else 2) / GIB
        cache = min(_up(needed, MIN_CACHE_GIB), _down(machine.memory_gib / 8, MIN_CACHE_GIB))
        why = f"the {rows} sequences of a step, if all had {longest} tokens, take {needed:.2g} GiB"
        draft.set(f"{section}.engine.kv_cache_gib", cache, why)


def _choose_for_one_gpu(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> None:
    """Give teacher and learner what they need of the GPU, and the rollout engine what is left."""
    teacher, rollout, gib = f"teachers.{TEACHER}.engine", "rollout.engine", machine.gpu_gib
    draft.set("ray.share_gpu", True, f"student, teacher and learner share the first GPU of {machine.gpus}")
    draft.set(f"{teacher}.kv_cache_gib", _up(TEACHER_SEQUENCES * _sequence_gib(sizes[TEACHER], longest), MIN_CACHE_GIB))
    rows = draft.value("prompts.prompts_per_step")
    draft.set(f"{rollout}.max_concurrent_sequences", rows, "all of a step")
    wanted = _up(rows * _sequence_gib(sizes[STUDENT], longest), MIN_CACHE_GIB)
    draft.set(f"{rollout}.kv_cache_gib", wanted)
    of_rollout, of_teacher, _ = estimate(draft.config(), sizes, longest, gib)
    engines_least = of_teacher.total + of_rollout.total - wanted + wanted / 4
    learner = _choose_micro_batch(draft, sizes, longest, gib, SHARED_LIMIT * gib - engines_least)
    of_learner = _up(learner.total / gib, 0.01)
    fraction = _up(of_teacher.total / gib, 0.01)
    left = _down(SHARED_LIMIT - of_learner - fraction, 0.01)
    cache = min(wanted, _down(left * gib - of_rollout.weights - of_rollout.working, MIN_CACHE_GIB))
    if cache <= 0:
        raise PlacementError(
            f"one GPU of {gib:.0f} GiB does not hold the run: the learner takes about {learner.total:.1f} GiB, the "
            f"teacher {of_teacher.total:.1f}, the rollout engine {engines_least - of_teacher.total:.1f}; take three "
            "GPUs, a larger one or smaller models"
        )
    draft.set("learner.gpu_memory_fraction", of_learner, f"about {learner.total:.1f} GiB")
    draft.set(f"{teacher}.gpu_memory_fraction", fraction, f"about {of_teacher.total:.1f} GiB")
    draft.set(f"{rollout}.gpu_memory_fraction", left, "what is left")
    draft.set(f"{rollout}.kv_cache_gib", cache, f"{wanted:g} would hold a step at its longest")


def _choose_for_gpus(draft: Draft, sizes: Mapping[str, ModelSize], longest: int, machine: Machine) -> None:
    """Give the learner and the teacher as few GPUs as hold them, and the rollout pool, the slowest, the rest."""
    gib = machine.gpu_gib
    ranks, width = max(1, machine.gpus // 4), 1
    while True:
        draft.set("learner.num_workers", ranks)
        learner = _choose_micro_batch(draft, sizes, longest, gib, gib)
        if learner.total <= gib or 2 * ranks >= machine.gpus:
            break
        ranks *= 2
    while True:
        draft.set(f"teachers.{TEACHER}.engine.tensor_parallel", width)
        fits = estimate(draft.config(), sizes, longest, gib)[1].fault() is None
        if fits or 2 * width >= machine.gpus:
            break
        width *= 2
    draft.set("learner.num_workers", ranks, f"a rank takes about {learner.total:.1f} GiB")
    left = machine.gpus - ranks - width
    draft.set("rollout.num_workers", max(1, left), "writing takes longest, so the pool has all other GPUs")


def _choose_micro_batch(
    draft: Draft, sizes: Mapping[str, ModelSize], longest: int, gpu_gib: float, limit_gib: float
) -> WorkerMemory:
    """Choose the largest micro-batch that fits; if none does, move the optimizer to host memory, and take the least."""
    for offload in ("none", "cpu"):
        for tokens, recomputes in MICRO_BATCHES:
            draft.set("learner.micro_batch_tokens", max(tokens, longest))
            draft.set("learner.gradient_checkpointing", recomputes)
            draft.set("learner.offload_optimizer", offload)
            learner = estimate(draft.config(), sizes, longest, gpu_gib)[-1]
            if learner.total <= limit_gib:
                return learner
    return learner


def _sequence_gib(size: ModelSize, tokens: int) -> float:
    return size.kv_values_per_token * tokens * 2 / GIB  # bfloat16


def _up(value: float, unit: float) -> float:
    return round(math.ceil(value / unit - 1e-9) * unit, 4)


def _down(value: float, unit: float) -> float:
    return round(math.floor(value / unit + 1e-9) * unit, 4)
