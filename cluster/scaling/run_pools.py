"""The pools of a run by the names that people give them: "rollout" and "teachers.NAME"."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ray.actor import ActorHandle

from cluster.contracts.config import Config
from cluster.contracts.observation import PoolState
from cluster.nodes.placement import PoolPlacement
from cluster.nodes.room import missing_for
from cluster.pipeline import Inputs, Pipeline
from cluster.run_directory import RunDirectory
from cluster.scaling.resizing import Scalable, Scaling
from cluster.scaling.teacher_needs import need_of
from teacher_workers.pool import TeacherPool
from teacher_workers.pools import TeacherPools

ROLLOUT = "rollout"


@dataclass(frozen=True)
class TeacherOfNow:
    """The pool of a teacher's name, whichever it is: another takes its place when the teacher is replaced."""

    pools: TeacherPools
    name: str

    @property
    def size(self) -> int:
        """Return how many workers it has or will have."""
        return self._pool.size

    @property
    def staying(self) -> Sequence[ActorHandle]:
        """Return the workers that serve, those first that stay when the pool shrinks."""
        return self._pool.staying

    def state(self) -> PoolState:
        """Return how it stands."""
        return self._pool.state()

    def resize(self, size: int) -> None:
        """Begin to change its size."""
        self._pool.resize(size)

    @property
    def _pool(self) -> TeacherPool:
        return self.pools.pools[self.name]


def placed_pools(pipeline: Pipeline) -> dict[str, PoolPlacement]:
    """Return what one worker of each pool takes."""
    teachers = {name: pipeline.placement.teachers[name] for name in pipeline.teachers.pools}
    return {ROLLOUT: pipeline.placement.rollout} | {f"teachers.{name}": share for name, share in teachers.items()}


def make_scaling(
    config: Config, inputs: Inputs, pipeline: Pipeline, directory: RunDirectory, progress: "Progress"
) -> Scaling:
    """Let the sizes of the pools be changed through the run's directory."""
    pools: dict[str, Scalable] = {ROLLOUT: pipeline.rollouts}
    pools |= {f"teachers.{name}": TeacherOfNow(pipeline.teachers, name) for name in pipeline.teachers.pools}
    shares = placed_pools(pipeline)

    def needed(pool: str) -> str | None:
        if pool == ROLLOUT:
            return "a run has at least one rollout worker"
        if config.balance.mode != "off":
            return "the balancer gives every pool at least one worker"
        # The workers of a slot are its teachers' together.
        served = next(names for names in config.scorer_groups.values() if pool.removeprefix("teachers.") in names)
        return need_of(served, config, inputs, progress.finished_step())

    def missing(changes: Mapping[str, int]) -> str | None:
        # The teachers of a slot have one share together.
        by_share = {shares[pool].name: (shares[pool], change) for pool, change in changes.items()}
        return missing_for(*by_share.values())

    _bring_back(config, pools, needed, progress)
    return Scaling(directory.scaling, pools, missing, progress.say, needed=needed)


def _bring_back(
    config: Config, pools: Mapping[str, Scalable], needed: Callable[[str], str | None], progress: "Progress"
) -> None:
    """Give teachers that were drained their workers again where the run went back to steps that need them."""
    num_workers = {f"teachers.{name}": teacher.num_workers for name, teacher in config.teachers.items()}
    for name, pool in pools.items():
        if pool.size or not num_workers[name]:  # the rollout pool always has some
            continue
        need = needed(name)
        if need is not None:
            pool.resize(num_workers[name])
            progress.say(f"{name}={num_workers[name]} again: {need}")


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and where it says something."""

    finished_step: Callable[[], int]
    say: Callable[[str], None]
