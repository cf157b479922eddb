"""Drives the learner's ranks: one group of actors that takes references to scored batches.

The driver plans a step from row counts alone; every rank fetches the batches that it needs by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from cluster.actors.cluster import RAY, Cluster
from cluster.actors.object_store import add_environment
from cluster.config.objective import ObjectiveConfig
from cluster.config.run_config import Config
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle, BatchSource, PoolState, Span, Stage
from cluster.contracts.errors import ActorDiedError, LearnerDiedError
from cluster.contracts.metrics import Max, Metric, Sum, merge, report
from cluster.contracts.trajectory import Floats
from cluster.weight_sync.manifest import WeightSyncReport
from learner.batching.arrivals import BatchBuffer
from learner.batching.plan import Round, RoundPlanner
from learner.checkpointing import checkpoint
from learner.checkpointing.checkpoint import PendingCheckpoint
from learner.checkpointing.manifest import Layout, verify

if TYPE_CHECKING:
    from ray.actor import ActorHandle

LEARNER_ACTOR = "learner.worker:LearnerActor"
# A grid's trajectories come from as many batches as there are, and each reference in a call costs the driver and Ray
# about as much as the call. Rounds in one call share their references.
ROUNDS_PER_CALL = 8
# Of a step, at least so much is in a round that goes out early though it is not full. A round costs as much as some 16
# short trajectories more, so that many small ones would take time from the engines and from the last round.
EARLY_PART = 0.25
CALLS_IN_FLIGHT = 2  # per rank: one is computed, and one waits, so that no rank waits for the driver
SIGN_OF_LIFE_SECONDS = 5.0  # when one rank dies, the others' collectives fail within this


class LearnerGroup:
    """Trains one student on N ranks that hold it between them; `options` are Ray's, of each rank."""

    def __init__(self, config: Config, options: Sequence[Mapping[str, Any]], cluster: Cluster = RAY) -> None:
        self._config = config
        self._cluster = cluster
        self._names = [f"learner-{rank}" for rank in range(config.learner.num_workers)]
        self._options = [_with_environment(option, config, rank) for rank, option in enumerate(options)]
        self._num_restarts = 0
        self._spans: list[Span] = []
        self._published_version = 0
        self._teacher_versions: dict[str, int] = {}  # of teachers that are the student, published last
        self._heads_due: list[tuple[int, Config]] = []  # steps before which LM heads are read again; config
        self._begin(self._names)

    def start_again(self) -> None:
        """End all ranks and start others, with the student as its files are."""
        self._cluster.shutdown(self._actors, timeout_seconds=0)
        self._heads_due.clear()  # they are read anew, and repeated steps have the present teachers
        # Ray may hold a dead actor's name for a while yet, so the next ones have a number of their own.
        self._num_restarts += 1
        self._begin([f"{name}-again-{self._num_restarts}" for name in self._names])

    def step(self, batches: BatchSource, step: int) -> dict[str, Metric]:
        """Take optimizer step `step` (from 0) on scored batches and return the metrics of all ranks together.

        Learning begins while batches still arrive: gradients of full micro-batches, or of what there is when the ranks
        have nothing to do, are added up at once. The weights change when the last batch is in.
        """
        while self._heads_due and self._heads_due[0][0] <= step:
            _, config = self._heads_due.pop(0)
            self._ask("read_teacher_heads", config, waiting_for="the learner to read the teachers' LM heads")
        with self._deaths_reported():
            num_tokens, parts = self._accumulate(batches, None, f"the learner to compute step {step}", step)
        taken = self._ask("take_step", num_tokens, step, waiting_for=f"the learner to take step {step}", stage="learn")
        busy_seconds = sum(part["busy_seconds"].value for part in (*parts, *taken)) / len(self._actors)
        weights = self._config.objective.scheduled_weights(step)
        scheduled = {f"weight/{name}": Max(weight) for name, weight in weights.items()}
        return merge([*parts, *taken]) | {"busy_seconds": Sum(busy_seconds)} | scheduled

    def replace_teachers(self, teachers: Mapping[str, TeacherConfig], first_step: int) -> None:
        """Read the LM heads of other teachers, where the objective needs any, before step `first_step` (from 0)."""
        self._config = msgspec.structs.replace(self._config, teachers=dict(teachers))
        if self._config.objective.needs.hidden:
            self._heads_due.append((first_step, self._config))

    def measure_gradient(self, batches: BatchSource, objective: ObjectiveConfig) -> dict[str, Metric]:
        """Return loss, gradient norm and the other metrics of a step, without taking it.

        The objective's support must be the run's own: it decides what the batches carry.
        """
        with self._deaths_reported():
            num_tokens, parts = self._accumulate(batches, objective, waiting_for="the learner's gradient")
        return merge([*parts, *self._ask("discard_step", num_tokens, waiting_for="the learner's gradient")])

    def take_kept_rows(self) -> list[Any]:
        """Ask every rank, without waiting, for what it has kept of the step, and return references."""
        return [actor.take_kept_rows.remote() for actor in self._actors]

    def student_logprobs(self, handle: BatchHandle) -> Floats:
        """Return the current student's log-probability of every completion token of the batch, rows in order."""
        return self._ask("student_logprobs", [handle.reference], waiting_for="the student's log-probabilities")[0]

    def publish_weights(self, rollout_workers: Sequence[ActorHandle], policy_version: int) -> WeightSyncReport:
        """Bring the current weights, as `policy_version`, to every rollout worker; a run may have none."""
        if not self._config.rollout.num_workers:
            self._published_version = policy_version
            return WeightSyncReport(policy_version, checksum="", num_bytes=0, seconds=0.0)
        waiting_for = f"the learner to publish policy version {policy_version}"
        arguments = (list(rollout_workers), policy_version)
        report, *_ = self._ask("publish_weights", *arguments, waiting_for=waiting_for, stage="sync")
        self._published_version = policy_version
        return report

    def bring_weights(self, rollout_worker: ActorHandle) -> Any:
        """Begin to send one rollout worker the weights that the others have; return a reference that is ready then.

        The gradients of a step under way are not touched.
        """
        answers = [actor.publish_weights.remote([rollout_worker], self._published_version) for actor in self._actors]
        return answers[0]

    def refresh_teacher(
        self, name: str, workers: Sequence[ActorHandle], version: int, takes_weights: bool
    ) -> WeightSyncReport:
        """Bring the weights of a teacher that is the student, as `version`, to every worker of its pool.

        Where it `takes_weights`, they are the student's of now, or its average; else those that it had before.
        """
        waiting_for = f"the learner to bring version {version} to teacher {name}"
        report, *_ = self._ask(
            "refresh_teacher", name, list(workers), version, takes_weights, waiting_for=waiting_for, stage="sync"
        )
        self._teacher_versions[name] = version
        return report

    def bring_teacher(self, name: str, worker: ActorHandle) -> Any:
        """Begin to send one worker of a teacher the weights that the others have; as `bring_weights`."""
        version = self._teacher_versions[name]
        answers = [actor.bring_teacher.remote(name, worker, version) for actor in self._actors]
        return answers[0]

    def begin_checkpoint(self, folder: Path, state: Mapping[str, Any]) -> PendingCheckpoint:
        """Begin to write the whole training state and the driver's own `state` (JSON values); one at a time."""
        return PendingCheckpoint(folder, state, Layout.of(self._config.learner), self._ask)

    def load_checkpoint(self, folder: Path) -> dict[str, Any]:
        """Restore the training state, after the checks of `verify`, and return the driver's own."""
        verify(folder, Layout.of(self._config.learner))
        state = checkpoint.read_state(folder)
        self._ask("load_shard", folder, waiting_for=f"the learner to restore {folder}")
        return state

    def export(self, folder: Path) -> None:
        """Write the student as a Hugging Face directory; complete or absent."""
        self._ask("export", folder, waiting_for=f"the learner to export to {folder}")

    def state(self) -> PoolState:
        return PoolState("learner", self._names, len(self._names), self._num_restarts)

    def take_spans(self) -> list[Span]:
        """Return, once, when the ranks were called to learn and to send weights."""
        spans, self._spans = self._spans, []
        return spans

    def shutdown(self) -> None:
        self._cluster.shutdown(self._actors)

    def _begin(self, names: Sequence[str]) -> None:
        world_size, timeout = len(names), self._config.ray.start_timeout_seconds
        arguments = [(self._config, rank, world_size) for rank in range(world_size)]
        self._actors = self._cluster.create(LEARNER_ACTOR, names, arguments, self._options)
        with ExitStack() as undo:
            undo.callback(self.shutdown)
            address = self._cluster.get(self._actors[0].address.remote(), timeout, "learner-0 to start")
            self._ask("start", address, waiting_for="the learner to load the student", timeout_seconds=timeout)
            undo.pop_all()

    def _accumulate(
        self, batches: BatchSource, objective: ObjectiveConfig | None, waiting_for: str, step: int = 0
    ) -> tuple[int, list[dict[str, Metric]]]:
        """Add up the gradients of batches as they come; return the tokens learned from and the ranks' metrics."""
        config = self._config
        arrivals = BatchBuffer(objective or config.objective, config.rollout.samples_per_prompt, step)
        planner = RoundPlanner(config.learner.num_workers, config.learner.forward_tokens)
        pending: dict[Any, tuple[str, float]] = {}  # reference -> rank, and when it was called
        answers: list[dict[str, Metric]] = []
        spans: list[Span] = []

        def send(rounds: Sequence[Round], completes_step: bool = False) -> None:
            for first in range(0, len(rounds), ROUNDS_PER_CALL):
                of_call = rounds[first : first + ROUNDS_PER_CALL]
                is_last = completes_step and first + len(of_call) == len(rounds)
                shares = map(arrivals.share, zip(*of_call, strict=True))
                called = {
                    actor.accumulate.remote(share, is_last, objective): (name, perf_counter())
                    for name, actor, share in zip(self._names, self._actors, shares, strict=True)
                }
                pending.update(called)

        def collect(references: Sequence[Any]) -> None:
            names = [pending[reference][0] for reference in references]
            answers.extend(self._cluster.get(list(references), config.ray.call_timeout_seconds, waiting_for, names))
            now = perf_counter()
            spans.extend(Span("learner", name, "learn", sent_at, now) for name, sent_at in map(pending.pop, references))

        while True:
            for handle in batches.take(wake_on=list(pending)):
                planner.add(arrivals.num_tokens(arrivals.add(handle)))
            if batches.is_exhausted:
                break
            collect(self._ready(list(pending)))
            send(self._due_rounds(planner, len(pending), arrivals.num_rows + batches.missing))
        planner.add(arrivals.num_tokens(arrivals.rest()))
        rounds = planner.all_rounds() or [((),) * config.learner.num_workers]
        answers += self._read_step(rounds, arrivals, objective, waiting_for)
        send(rounds, completes_step=True)
        while pending:
            batches.move_on_until(list(pending))
            collect(self._ready(list(pending)) or list(pending))
        self._spans += spans
        return max(1, arrivals.num_loss_tokens), answers

    def _ready(self, references: Sequence[Any]) -> list[Any]:
        """Return those that are ready now, in their order."""
        ready = set(self._cluster.wait(references, len(references), timeout_seconds=0))
        return [reference for reference in references if reference in ready]

    def _read_step(
        self, rounds: Sequence[Round], arrivals: BatchBuffer, objective: ObjectiveConfig | None, waiting_for: str
    ) -> list[dict[str, Metric]]:
        """Let the ranks read the whole step, of which nothing was sent yet, if they need means over it to learn."""
        if not arrivals.objective.needs.step_means:
            return []
        parts: list[dict[str, Metric]] = []
        for first in range(0, len(rounds), ROUNDS_PER_CALL):
            shares = map(arrivals.share, zip(*rounds[first : first + ROUNDS_PER_CALL], strict=True))
            calls = [
                actor.advantage_sums.remote(share, objective) for actor, share in zip(self._actors, shares, strict=True)
            ]
            parts += self._cluster.get(calls, self._config.ray.call_timeout_seconds, waiting_for, self._names)
        sums = merge(parts)
        busy_seconds = sums.pop("busy_seconds")
        arrivals.step_means = report(sums)
        return [{"busy_seconds": busy_seconds}]

    def _due_rounds(self, planner: RoundPlanner, num_pending: int, num_rows: int) -> Sequence[Round]:
        """Return the rounds to send while batches of a step of `num_rows` still arrive.

        While the ranks compute, what is not enough for a round waits for more; and while they have more to compute than
        one call, full rounds wait too, and go in fewer calls. Without anything to compute, they get what there is if it
        is a good part of the step.
        """
        if num_pending >= CALLS_IN_FLIGHT * len(self._actors):
            return []
        is_enough = not num_pending and planner.num_waiting >= EARLY_PART * num_rows
        return planner.full_rounds() or (planner.all_rounds() if is_enough else [])

    def _ask(
        self,
        method: str,
        *args: Any,
        waiting_for: str,
        timeout_seconds: float | None = None,
        stage: Stage | None = None,  # None: not worth a span
    ) -> list[Any]:
        began = perf_counter()
        with self._deaths_reported():
            answers = self._cluster.call_all(
                self._actors,
                method,
                *args,
                timeout_seconds=timeout_seconds or self._config.ray.call_timeout_seconds,
                waiting_for=waiting_for,
                names=self._names,
            )
        if stage is not None:
            now = perf_counter()
            self._spans += [Span("learner", name, stage, began, now) for name in self._names]
        return answers

    @contextmanager
    def _deaths_reported(self) -> Iterator[None]:
        """Raise a rank's death as LearnerDiedError; the other ranks fail too then, each with its own error."""
        try:
            yield
        except (ActorDiedError, _task_error()) as error:
            dead = self._dead_ranks()
            if not dead:
                raise
            names = ", ".join(self._names[rank] for rank in dead)
            died = LearnerDiedError(f"{names} died, and with it the step under way")
            raise self._cluster.explain(died, self._actors[dead[0]]) from error

    def _dead_ranks(self) -> list[int]:
        """Request a sign of life from every rank; a rank that is busy for long counts as alive."""
        answers = {actor.__ray_ready__.remote(): rank for rank, actor in enumerate(self._actors)}
        ready = self._cluster.wait(list(answers), len(answers), SIGN_OF_LIFE_SECONDS)
        return [answers[reference] for reference in ready if self._cluster.is_dead(reference)]


def _task_error() -> type[Exception]:
    from ray.exceptions import RayTaskError

    return RayTaskError


def _with_environment(option: Mapping[str, Any], config: Config, rank: int) -> dict[str, Any]:
    """Add what DeepSpeed and OpenMP read from the environment; every actor sees its own GPU as the only one."""
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(config.learner.num_workers),
        "LOCAL_RANK": "0",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # torch's, once per rank, about calls that DeepSpeed makes
    }
    if config.learner.cpu_threads is not None:
        variables["OMP_NUM_THREADS"] = str(config.learner.cpu_threads)
    return add_environment(option, variables)
