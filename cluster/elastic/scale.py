"""Changes the sizes of pools while a run goes on: `preceptor scale RUN rollout=6 teachers.math=3`."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING
from uuid import uuid4

from cluster.config.run_config import Config
from cluster.config.run_directory import ControlFiles
from cluster.contracts.errors import ConfigError, PlacementError
from cluster.elastic.control_files import ANSWER_SECONDS, ControlRequests, Message, ask_driver, read_message
from cluster.elastic.splits import ROLLOUT, describe_sizes
from cluster.placement.capacity import missing_for
from cluster.placement.placement import PoolPlacement
from cluster.run.hooks import RunContext, StepHook
from cluster.run.inputs import Inputs

if TYPE_CHECKING:
    from cluster.run.pools import Pipeline
    from rollout_workers.pool import RolloutPool
    from teacher_workers.pool import TeacherPool

LARGEST_POOL = 100_000


# By the names of the command; called anew, for a teacher that was replaced has another pool.
Pools = Callable[[], Mapping[str, "RolloutPool | TeacherPool"]]


class ScaleRequest(Message, frozen=True, forbid_unknown_fields=True):
    """Requests sizes of pools from a running driver."""

    sizes: dict[str, int]  # by pool: "rollout" or "teachers.NAME"


class ScaleResponse(Message, frozen=True, forbid_unknown_fields=True):
    """Answers a ScaleRequest."""

    sizes: dict[str, int]  # of all pools, afterwards
    refusal: str | None  # a sentence; None: it was granted


class Scaling(StepHook):
    """Grants the requests for other sizes of pools that the cluster has GPUs for."""

    def __init__(
        self,
        files: ControlFiles,
        pools: Pools,
        missing: Callable[[Mapping[str, int]], str | None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        needed: Callable[[str], str | None] = lambda name: "it has at least one worker",
    ) -> None:
        """Take the run's pools.

        `missing` says what the cluster lacks for so many more or fewer workers of pools, and `needed` why a pool cannot
        be without workers; None: nothing, and it can.
        """
        self._pools, self._missing, self._say, self._needed = pools, missing, say, needed
        self._files, self._requests = files, ControlRequests(files, clock)

    def restore(self) -> None:
        """Give pools that have just started the sizes that the last request before the resume set."""
        answered = read_message(self._files.answer, ScaleResponse)
        if answered is None:
            return
        pools = self._pools()
        sizes = {
            name: size
            for name, size in answered.sizes.items()
            if name in pools and size != pools[name].size and (size or not self._needed(name))
        }
        if sizes:
            refusal = self._grant(sizes)
            self._say(f"as asked before the run was resumed: {refusal or describe_sizes(sizes)}")

    def while_waiting(self) -> None:
        """Grant or refuse a new request; most calls find none and return at once."""
        request = self._requests.take(ScaleRequest)
        if request is None:
            return
        refusal = self._grant(request.sizes)
        sizes = {name: pool.size for name, pool in self._pools().items()}
        self._requests.answer(ScaleResponse(request.request_id, sizes, refusal))
        self._say(refusal or f"scaled: {describe_sizes(sizes)}")

    def _grant(self, sizes: Mapping[str, int]) -> str | None:
        pools = self._pools()
        for name, size in sizes.items():
            if name not in pools:
                return f"there is no pool {name!r}; this run has {', '.join(pools)}"
            if not 0 <= size <= LARGEST_POOL:
                return f"{name}={size}: a pool has up to {LARGEST_POOL} workers"
            need = None if size else self._needed(name)
            if need is not None:
                return f"{name}=0: {need}"
        changes = {name: size - pools[name].size for name, size in sizes.items()}
        growing = {name: sizes[name] for name, change in changes.items() if change > 0}
        lack = self._missing(changes) if growing else None
        if lack is not None:
            return f"{describe_sizes(growing)}: {lack}"
        for name, size in sizes.items():
            pools[name].resize(size)
        return None


def ask(files: ControlFiles, sizes: Mapping[str, int], timeout_seconds: float = ANSWER_SECONDS) -> ScaleResponse:
    """Ask a running driver for other sizes and wait for its answer; raise PlacementError if it refuses."""
    answer = ask_driver(files, ScaleRequest(uuid4().hex, dict(sizes)), ScaleResponse, timeout_seconds)
    if answer.refusal is not None:
        raise PlacementError(answer.refusal)
    return answer


def parse_sizes(arguments: list[str]) -> dict[str, int]:
    """Read `rollout=6 teachers.math=3`; raise ConfigError for anything else.

    Example:
        >>> parse_sizes(["rollout=6", "teachers.math=3"])
        {'rollout': 6, 'teachers.math': 3}
    """
    sizes = {}
    for argument in arguments:
        name, _, number = argument.partition("=")
        if not (name and number.isascii() and number.isdigit() and len(number) < 7):
            raise ConfigError(f"'{argument}': expected POOL=WORKERS, such as rollout=6 or teachers.math=3")
        sizes[name] = int(number)
    if not sizes:
        raise ConfigError("nothing to scale; name at least one pool, such as rollout=6 or teachers.math=3")
    return sizes


def need_of(teachers: Collection[str], config: Config, inputs: Inputs, next_step: int) -> str | None:
    """Say what a run that has `next_step` steps behind it needs one of these teachers for; None: nothing.

    Example of a result: "step 13 asks prompts that teacher math scores".
    """
    if config.sampling_teacher in teachers:
        return f"teacher {config.sampling_teacher} writes for prompts that the student never solves"
    scorers = {route: [name for name, _ in config.scorers(route)] for route in config.routes}
    served = {route: name for route, names in scorers.items() for name in reversed(names) if name in teachers}
    per_step = config.prompts.prompts_per_step
    left = (config.run.steps - next_step) * per_step
    # Two epochs' worth holds a whole one, and that every prompt.
    asked = inputs.train.take(next_step * per_step, max(0, min(left, 2 * len(inputs.prompts))))
    for position, prompt_id in enumerate(asked):
        name = served.get(inputs.prompts.teacher(prompt_id))
        if name is not None:
            step = next_step + position // per_step + 1
            return f"step {step} asks prompts that teacher {name} scores"
    for prompt_id in inputs.held_out_ids:
        name = served.get(inputs.prompts.teacher(prompt_id))
        if name is not None:
            return f"held-out prompts are scored by teacher {name}"
    return None


def pools_of(pipeline: "Pipeline") -> dict[str, "RolloutPool | TeacherPool"]:
    """Return the pools of now, by the names of the command."""
    return {ROLLOUT: pipeline.rollouts} | {f"teachers.{name}": pool for name, pool in pipeline.teachers.pools.items()}


def placed_pools(pipeline: "Pipeline") -> dict[str, PoolPlacement]:
    """Return what one worker of each pool takes."""
    teachers = {name: pipeline.placement.teachers[name] for name in pipeline.teachers.pools}
    return {ROLLOUT: pipeline.placement.rollout} | {f"teachers.{name}": share for name, share in teachers.items()}


def make_scaling(run: RunContext) -> Scaling:
    """Let the sizes of the pools be changed through the run's directory."""
    config, pipeline = run.config, run.pipeline
    shares = placed_pools(pipeline)

    def needed(pool: str) -> str | None:
        if pool == ROLLOUT:
            return "a run has at least one rollout worker"
        if config.balance.mode != "off":
            return "the balancer gives every pool at least one worker"
        # The workers of a slot are its teachers' together.
        served = next(names for names in config.scorer_groups.values() if pool.removeprefix("teachers.") in names)
        return need_of(served, config, run.inputs, run.ledger.finished_step)

    def missing(changes: Mapping[str, int]) -> str | None:
        # The teachers of a slot have one share together.
        by_share = {shares[pool].name: (shares[pool], change) for pool, change in changes.items()}
        return missing_for(*by_share.values())

    _bring_back(run, needed)
    scaling = Scaling(run.directory.scaling, lambda: pools_of(pipeline), missing, run.view.say, needed=needed)
    if run.is_first_attempt:  # later the pools still have their sizes
        scaling.restore()
    return scaling


def _bring_back(run: RunContext, needed: Callable[[str], str | None]) -> None:
    """Give teachers that were drained their workers again where the run went back to steps that need them."""
    num_workers = {f"teachers.{name}": teacher.num_workers for name, teacher in run.config.teachers.items()}
    for name, pool in pools_of(run.pipeline).items():
        if pool.size or not num_workers.get(name):  # the rollout pool has some, or replays all rows
            continue
        need = needed(name)
        if need is not None:
            pool.resize(num_workers[name])
            run.view.say(f"{name}={num_workers[name]} again: {need}")
