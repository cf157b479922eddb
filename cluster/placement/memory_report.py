"""Shows what lies on the GPUs of a run, and says in one sentence what cannot fit and which setting would change it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from cluster.config.draft import to_toml
from cluster.config.run_config import Config
from cluster.config.stages import EngineConfig
from cluster.contracts.errors import PlacementError
from cluster.models.model_size import ModelSize
from cluster.placement.memory import PARTS, Lengths, WorkerMemory, estimate

LEAST_TOKENS = 2048  # of a micro-batch that is proposed
SHARED_LIMIT = 0.95  # of a GPU that all stages share
MOST_RANKS, MOST_TENSOR_PARALLEL = 64, 8  # that are proposed


@dataclass(frozen=True)
class MemoryPlan:
    """Holds the run with all choices made, and what its workers take."""

    config: Config
    workers: Mapping[str, WorkerMemory]  # by pool
    gpu_gib: float | None = None  # None: there is no GPU, and nothing was chosen
    choices: tuple[str, ...] = ()  # what was, for people
    fault: str | None = None  # what cannot fit, and which setting would change it

    def refuse(self) -> None:
        """Raise PlacementError if something cannot fit."""
        if self.fault is not None:
            raise PlacementError(self.fault)

    def lines(self) -> list[str]:
        """Return a table of what lies on one GPU of each pool, and how much the caches hold."""
        parts = [part for part in PARTS if any(getattr(one, part) > 0.05 for one in self.workers.values())]
        rows = [["GiB".ljust(20), *parts, "sum", *(["GPU", "left"] if self.gpu_gib else [])]]
        for pool, one in self.workers.items():
            of = [] if one.available is None else [f"{one.available:.1f}", f"{one.available - one.total:.1f}"]
            rows.append([pool.ljust(20), *(_number(getattr(one, part)) for part in parts), f"{one.total:.1f}", *of])
        if self.gpu_gib and self.config.ray.share_gpu:
            total = sum(shares(self.config).values()) * self.gpu_gib
            last = [f"{total:.1f}", f"{self.gpu_gib:.1f}", f"{self.gpu_gib - total:.1f}"]
            rows.append(["all workers".ljust(20), *[""] * len(parts), *last])
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(rows[0]))]
        table = ["  ".join(map(_padded, row, widths)) for row in rows]
        caches = [
            f"{pool}: the cache holds {one.cache_tokens:,} tokens, {one.sequences:,.0f} of the longest sequences "
            f"({one.longest_tokens:,})"
            for pool, one in self.workers.items()
            if one.cache_tokens is not None and one.sequences is not None
        ]
        return [line.rstrip() for line in table] + caches


Choose = Callable[[Config], Config]  # divides a shared GPU among those whose shares are open


def worker_fault(
    config: Config,
    sizes: Mapping[str, ModelSize],
    lengths: Lengths,
    worker: WorkerMemory,
    gpu_gib: float,
    choose: Choose,
) -> str | None:
    """Say in one sentence why a worker cannot work, and what would let it; None if nothing is known against it."""
    if worker.available is None or worker.fits:
        return None
    of = (
        f"of {worker.available:.1f} GiB on a GPU of {gpu_gib:.1f}"
        if config.ray.share_gpu
        else f"of a GPU's {gpu_gib:.1f} GiB"
    )
    if not worker.has_sequence:
        what = (
            f"{worker.pool}: {worker.total - worker.cache:.1f} GiB ({_parts(worker, 'cache')}) leave "
            f"{worker.cache:.2f} {of} to the cache, which holds {worker.cache_tokens:,} tokens and no sequence of "
            f"{worker.longest_tokens:,}"
        )
    else:
        what = f"{worker.pool}: a worker needs about {worker.total:.1f} GiB ({_parts(worker)}) {of}"
    if config.ray.share_gpu:
        text, opened = _opened(config, worker.pool)
        chosen = choose(opened)
        is_divided = sum(shares(chosen).values()) <= SHARED_LIMIT + 1e-6
        if is_divided and estimate(chosen, sizes, lengths, gpu_gib)[worker.pool].fits:
            return f"{what}; leave {text} out of the run file: the GPU has room, and its share is then chosen"
    for text, changed in _changes(config, worker.pool):
        if estimate(changed, sizes, lengths, gpu_gib)[worker.pool].fits:
            return f"{what}; {text}"
    return f"{what}; take larger GPUs or a smaller model"


def _opened(config: Config, pool: str) -> tuple[str, Config]:
    """Return the settings of a pool's share of a shared GPU, and the run without them."""
    if pool == "learner":
        return "learner.gpu_memory_fraction", replace(config, learner=replace(config.learner, gpu_memory_fraction=None))
    section = "rollout" if pool == "rollout" else f"teachers.{pool.removeprefix('teacher-')}"
    text = f"{section}.engine.gpu_memory_fraction and kv_cache_gib"
    return text, with_engines(config, {pool: {"gpu_memory_fraction": None, "kv_cache_gib": None}})


def _changes(config: Config, pool: str) -> Iterator[tuple[str, Config]]:
    """Return settings that let a worker take less, the mildest first, and the run with each."""
    if pool != "learner":
        section = "rollout" if pool == "rollout" else f"teachers.{pool.removeprefix('teacher-')}"
        yield from _engine_changes(config, pool, section)
        return
    learner = config.learner
    least: dict[str, Any] = {} if learner.recomputes else {"gradient_checkpointing": True}
    steps = [least]
    if learner.forward_tokens > LEAST_TOKENS:
        least = {**least, "micro_batch_tokens": LEAST_TOKENS}
        steps.append(least)
    stage = {} if learner.zero_stage >= 2 else {"zero_stage": 2}
    offload = {} if learner.offload_optimizer == "cpu" else {"offload_optimizer": "cpu"}
    steps.append({**least, **stage, **offload})
    ranks = learner.num_workers
    while ranks <= MOST_RANKS and not config.ray.share_gpu:
        several = {"num_workers": ranks} if ranks > learner.num_workers else {}
        steps += [{**least, **stage, **several}] if several else []
        steps += [{**least, **several, "zero_stage": 3}, {**least, **several, "zero_stage": 3, **offload}]
        ranks *= 2
    for step in filter(None, steps):
        text = ", ".join(f"learner.{name} = {to_toml(value)}" for name, value in step.items())
        yield f"set {text}", replace(config, learner=replace(learner, **step))


def _engine_changes(config: Config, pool: str, section: str) -> Iterator[tuple[str, Config]]:
    engine = config.rollout.engine if pool == "rollout" else config.teachers[section.removeprefix("teachers.")].engine
    if not config.ray.share_gpu:
        yield f"lower {section}.engine.gpu_memory_fraction", with_engines(config, {pool: {"gpu_memory_fraction": None}})
    ranks = 2 * max(1, engine.tensor_parallel)
    while ranks <= MOST_TENSOR_PARALLEL and not config.ray.share_gpu:
        text = f"set {section}.engine.tensor_parallel = {ranks}"
        yield text, with_engines(config, {pool: {"tensor_parallel": ranks, "gpu_memory_fraction": None}})
        ranks *= 2


def shared_fault(config: Config, workers: Mapping[str, WorkerMemory], gpu_gib: float, choose: Choose) -> str | None:
    """Say in one sentence that a GPU does not hold all workers, as `choose` has divided it; None if it does."""
    if sum(shares(config).values()) <= SHARED_LIMIT + 1e-6:
        return None
    needs = [f"the learner takes about {workers['learner'].total:.1f} GiB"]
    needs += [f"{pool} {one.total:.1f}" for pool, one in workers.items() if pool != "learner"]
    gpus = config.rollout.num_workers + config.learner.num_workers
    gpus += sum(config.teachers[names[0]].num_workers for names in config.scorer_groups.values())
    advice = f"take {gpus} GPUs, a larger one or smaller models"
    learner = config.learner
    if learner.offload_optimizer == "none":
        stage = max(2, learner.zero_stage)
        learner = replace(learner, offload_optimizer="cpu", zero_stage=stage, gpu_memory_fraction=None)
        if sum(shares(choose(replace(config, learner=learner))).values()) <= SHARED_LIMIT + 1e-6:
            advice = 'set learner.offload_optimizer = "cpu"'
    return (
        f"one GPU of {gpu_gib:.0f} GiB does not hold the run: {', '.join(needs)}, and {1 - SHARED_LIMIT:.0%} must stay "
        f"free; {advice}"
    )


def describe_choices(config: Config, planned: Config, workers: Mapping[str, WorkerMemory]) -> Iterator[str]:
    """Say what was open and is chosen, one line for the learner and one for each engine on a shared GPU."""
    learner, chosen, memory = config.learner, planned.learner, workers["learner"]
    if learner.micro_batch_tokens is None or learner.gradient_checkpointing is None:
        how = "with" if chosen.recomputes else "without"
        yield (
            f"learner: micro-batches of {chosen.forward_tokens:,} tokens {how} gradient checkpointing, so that a rank "
            f"takes about {memory.total:.1f} of {memory.available or 0.0:.1f} GiB (learner.micro_batch_tokens, "
            "learner.gradient_checkpointing)"
        )
    engines = {"rollout": config.rollout.engine}
    engines |= {f"teacher-{name}": one.engine for name, one in config.teachers.items()}
    for pool, engine in engines.items():
        if config.ray.share_gpu and engine.kv_cache_gib is None and pool in workers:
            yield (
                f"{pool}: a cache of {workers[pool].cache:.2f} GiB, {workers[pool].cache_tokens:,} tokens "
                "(engine.kv_cache_gib)"
            )


def _parts(worker: WorkerMemory, *without: str) -> str:
    shown = {part: getattr(worker, part) for part in PARTS if part not in without}
    return ", ".join(f"{part} {value:.1f}" for part, value in shown.items() if value >= 0.05)


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 0.05 else "-"


def _padded(cell: str, width: int) -> str:
    return cell.rjust(width)


def engines_of(config: Config, sizes: Mapping[str, ModelSize]) -> dict[str, EngineConfig]:
    """Return the engines whose models are known, by what `estimate` calls their pools."""
    teachers = {f"teacher-{name}": one.engine for name, one in config.teachers.items() if name in sizes}
    return {"rollout": config.rollout.engine, **teachers}


def has_workers(config: Config, pool: str) -> bool:
    """Return whether the run starts workers of a pool, as `estimate` calls it."""
    numbers = {f"teacher-{name}": one.num_workers for name, one in config.teachers.items()}
    numbers |= {"rollout": config.rollout.num_workers, "learner": config.learner.num_workers}
    return numbers[pool] > 0


def with_engines(config: Config, changes: Mapping[str, Mapping[str, Any]]) -> Config:
    rollout = replace(config.rollout, engine=replace(config.rollout.engine, **changes.get("rollout", {})))
    teachers = {
        name: replace(one, engine=replace(one.engine, **changes.get(f"teacher-{name}", {})))
        for name, one in config.teachers.items()
    }
    return replace(config, rollout=rollout, teachers=teachers)


def sum_of_shares(config: Config, shares: Mapping[str, float]) -> float:
    """Return what all engines have together of a GPU; the teachers of a slot have what the largest of them needs."""
    total = config.rollout.num_workers * shares["rollout"]
    for names in config.scorer_groups.values():
        total += config.teachers[names[0]].num_workers * max(shares.get(f"teacher-{name}", 0.0) for name in names)
    return total


def shares(config: Config) -> dict[str, float]:
    """Return what the engines and the learner have of a shared GPU."""
    engines = {"rollout": config.rollout.engine.gpu_memory_fraction or 0.0}
    engines |= {f"teacher-{name}": one.engine.gpu_memory_fraction or 0.0 for name, one in config.teachers.items()}
    return {"engines": sum_of_shares(config, engines), "learner": config.learner.gpu_memory_fraction or 0.0}
