"""Divides a GPU that all stages share, and makes the choices of a run that depend on its GPUs.

The memory plan has set every share where the GPU's size is known; what is open here is divided without looking at the
models.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from cluster.config.run_config import Config
from cluster.config.stages import EngineConfig
from cluster.contracts.errors import PlacementError
from cluster.weight_sync.transports import choose

PROCESS_FRACTION = 0.05  # of a shared GPU: each process has a CUDA context of its own, some 0.5 GB
LEAST_FRACTION = 0.02  # below it an engine would not hold a model
LEARNER_FRACTION = 0.4


@dataclass(frozen=True)
class GpuShares:
    """Holds the parts of one GPU's memory."""

    rollout: float  # of each worker
    teachers: dict[str, float]  # of each worker
    learner: float


def share_gpu(config: Config) -> GpuShares:
    """Divide a GPU's memory among the workers, as set or in equal parts; raise PlacementError if it does not fit."""
    pools = _engines(config)
    for name, (_, engine) in pools.items():
        if engine.tensor_parallel > 1:
            raise PlacementError(
                f"{name}: engine.tensor_parallel is {engine.tensor_parallel}, and with ray.share_gpu there is one GPU"
            )
    if config.learner.num_workers > 1:
        raise PlacementError(
            f"learner.num_workers is {config.learner.num_workers}, and with ray.share_gpu there is one GPU"
        )
    fixed = [count * engine.gpu_memory_fraction for count, engine in pools.values() if engine.gpu_memory_fraction]
    of_learner = config.learner.gpu_memory_fraction or LEARNER_FRACTION
    left = 1 - PROCESS_FRACTION - of_learner - sum(fixed)
    open_engines = sum(count for count, engine in pools.values() if engine.gpu_memory_fraction is None)
    each = left / open_engines if open_engines else 0.0
    if left < -1e-9 or (open_engines and each < LEAST_FRACTION):
        raise PlacementError(_refusal(config, left, open_engines))
    shares = {name: engine.gpu_memory_fraction or each for name, (_, engine) in pools.items()}
    # Those whose backends need no GPU have no share.
    teachers = {name: shares.get(label, 0.0) for label, names in config.scorer_groups.items() for name in names}
    return GpuShares(shares["rollout"], teachers, of_learner)


def with_gpus(config: Config, on_gpu: bool) -> Config:
    """Return the run with every choice made that depends on where it runs."""
    payload, transport = choose(config, on_gpu)
    sync = replace(config.weight_sync, payload=payload, transport=transport)
    if not (on_gpu and config.ray.share_gpu):
        return replace(config, weight_sync=sync)
    shares = share_gpu(config)
    rollout = replace(config.rollout, engine=replace(config.rollout.engine, gpu_memory_fraction=shares.rollout))
    teachers = {
        name: replace(teacher, engine=replace(teacher.engine, gpu_memory_fraction=shares.teachers[name]))
        for name, teacher in config.teachers.items()
    }
    return replace(config, weight_sync=sync, rollout=rollout, teachers=teachers)


def _engines(config: Config) -> dict[str, tuple[int, EngineConfig]]:
    """Return how many engines every pool has on GPUs, and how they are built; a slot is as large as its largest."""
    engines = {"rollout": (config.rollout.num_workers, config.rollout.engine)}
    for label, names in config.scorer_groups.items():
        teachers = [config.teachers[name] for name in names]
        largest = max(teachers, key=lambda teacher: teacher.engine.gpu_memory_fraction or 0.0)
        if largest.engine.tensor_parallel:
            engines[label] = (largest.num_workers, largest.engine)
    return engines


def _refusal(config: Config, left: float, open_engines: int) -> str:
    taken = [
        f"{name} {count} x {engine.gpu_memory_fraction:g}"
        for name, (count, engine) in _engines(config).items()
        if engine.gpu_memory_fraction
    ]
    of_learner = config.learner.gpu_memory_fraction or LEARNER_FRACTION
    parts = ", ".join([*taken, f"learner {of_learner:g}", f"{PROCESS_FRACTION:g} for processes"])
    others = f" for {open_engines} more engines, which need {LEAST_FRACTION:g} each" if open_engines else ""
    return f"one GPU has no room for the run: {parts} leave {left:.2f}{others}; lower gpu_memory_fraction"
