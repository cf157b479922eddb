"""The pools of a run by the names that people give them: "rollout" and "teachers.NAME"."""

from collections.abc import Callable, Sequence
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

    def missing(pool: str, more: int) -> str | None:
        return missing_for(shares[pool], more)

    return Scaling(directory.scaling, pools, missing, progress.say, needed=needed)


@dataclass(frozen=True)
class Progress:
    """How far a run has come, and where it says something."""

    finished_step: Callable[[], int]
    say: Callable[[str], None]
