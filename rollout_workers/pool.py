"""Spreads requests over rollout actors, and gives what a dead one owes to the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cluster.actors.cluster import RAY, Cluster, PoolTimeouts
from cluster.actors.object_store import STORE_ENVIRONMENT, add_environment
from cluster.actors.replicas import Pool, Replicas, Supervision
from cluster.config.sections import EnvironmentConfig, PromptsConfig, StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.batches import BatchHandle, PoolState, Span
from cluster.contracts.errors import ActorDiedError, PreceptorError
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.prompts import PromptSet
from rollout_workers.scheduling import ExpectedLengths, spread

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from rollout_workers.contexts.builder import ContextSettings
    from rollout_workers.privileged import PrivilegedSettings

ROLLOUT_ACTOR = "rollout_workers.actor:RolloutActor"

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class RolloutActorSettings:
    """Says how an actor starts; equal for all actors of a pool."""

    student: StudentConfig
    engine: EngineConfig
    max_model_len: int  # tokens of the longest trajectory, plus 1
    rows_per_batch: int
    weight_transport: str | None  # a key of TRANSPORTS; None: the weights never change
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    sampled_candidates: bool = False  # whether sampling settings may ask for sampled candidates
    merges_stops: bool = False  # whether they may have a class of stop ids
    keeps_cache: bool = False  # whether running requests keep their keys and values when the weights change
    float32_head: bool = False  # on a GPU: logits in float32, as the learner's are
    rests: bool = False  # whether engines give up weights and all when a step's rollouts are done, for new ones follow
    contexts: ContextSettings | None = None  # of teachers that read other prompts than the student
    # What rendered the prompts, for environments that continue them: the tokenizer's folder, the settings, the time.
    chat: tuple[StudentConfig, PromptsConfig, datetime] | None = None
    privileged: PrivilegedSettings | None = None  # what samples for prompts that the student never solves


@dataclass(frozen=True)
class _Assignment:
    """Holds what one call to a worker owes."""

    worker: int
    call: int  # names the rollout to the worker
    rollout: int  # as in `RolloutPool.submit`
    requests: Sequence[RolloutRequest]  # without those whose trajectories came back
    sampling: SamplingSettings
    wire: Any = None  # reference to the next batch's bytes
    sent_at: float = 0.0  # on the clock of `perf_counter`


class RolloutPool(Pool):
    """Spreads requests over rollout actors and hands back batches as they finish anywhere.

    The others take over at once what a dead worker owes; the worker is started again, gets the prompts and the current
    weights, and takes part from then on. Calls raise ActorError when workers die more often than they may, and
    RolloutError when an engine gives up a request.
    """

    def __init__(
        self,
        settings: RolloutActorSettings,
        options: Sequence[Mapping[str, Any]],
        timeouts: PoolTimeouts,
        name: str = "rollout",
        cluster: Cluster = RAY,
        supervision: Supervision | None = None,
        spare: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to start the actors, one per entry of Ray's `options`, called `name`-0, `name`-1, ...

        Without `supervision`, dead ones are never started again. `spare` has the options of later ones of a pool that
        begins with none.
        """
        self._name = name
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self.cluster = cluster
        later = None if spare is None or options else add_environment(spare, STORE_ENVIRONMENT)
        replicas = Replicas(name, ROLLOUT_ACTOR, lambda _name: (settings,), options, cluster, supervision, later)
        super().__init__(f"pool {name}", replicas, timeouts)
        replicas.prepare_with(self._prepare)
        self._lengths = ExpectedLengths(lambda prompt_id: "")
        self._prompts: Any = None  # reference to the prompts' wire bytes
        self._bring_weights: Callable[[ActorHandle], Any] | None = None
        self._rollout_ids = count(-1, -1)  # below every step, so that `generate` never waits for one
        self._calls = count()
        self._rests = settings.rests
        self._awaited: dict[Any, _Assignment] = {}  # by the reference to the next batch's handle
        self._unassigned: list[tuple[int, Sequence[RolloutRequest], SamplingSettings]] = []  # while no worker serves

    @property
    def actors(self) -> list[ActorHandle]:
        """Return the actors whose weights are kept current; the learner's sender calls their weight verbs."""
        return self.replicas.prepared

    def set_prompts(self, prompts: PromptSet) -> None:
        """Give every actor the prompts; their bytes go into the object store once."""
        self._prompts = self.cluster.put(prompts.to_wire())
        self.cluster.call_all(
            self.actors,
            "set_prompts",
            self._prompts,
            timeout_seconds=self._timeouts.call_seconds,
            waiting_for=f"set_prompts in pool {self._name}",
            names=[self.replicas.name(worker) for worker in self.replicas.serving],
        )
        self._lengths = ExpectedLengths(prompts.domain)

    def bring_weights_with(self, bring: Callable[[ActorHandle], Any]) -> None:
        """Set how a worker that was started again gets the current weights; returns a reference that is ready then."""
        self._bring_weights = bring

    def submit(self, rollout: int, requests: Sequence[RolloutRequest], sampling: SamplingSettings) -> None:
        """Hand requests to the workers that serve, those expected to be long first, and return at once.

        `rollout` is the step, in training; a worker that cannot run all at once runs those of the lowest number first.
        """
        serving = self.replicas.serving
        if not serving:
            self._unassigned.append((rollout, requests, sampling))
            return
        for worker, share in zip(serving, spread(requests, len(serving), self._lengths.expect), strict=True):
            if share:
                assignment = _Assignment(worker, next(self._calls), rollout, share, sampling)
                self._send("start_rollout", assignment, share, sampling, rollout)

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        """Return the batches that are ready, and ask their workers for the next ones; `ready` may hold other things."""
        came = [reference for reference in ready if reference in self._awaited]
        answers = self.cluster.get_each(came, lambda came: f"a batch from {self._worker_of(came)}")
        taken = (
            self._take(reference, answer)
            for reference, answer in zip(came, answers, strict=True)
            if reference in self._awaited  # else its worker died meanwhile
        )
        handles = [handle for handle in taken if handle is not None]
        if self.replicas.admit_started(ready):
            unassigned, self._unassigned = self._unassigned, []
            for rollout, requests, sampling in unassigned:
                self.submit(rollout, requests, sampling)
        return handles

    def maintain(self) -> list[Any]:
        """Replace workers that died unnoticed, start those whose rest is over, and return references to wait for.

        They are of batches that are owed, and of what starting workers do; `collect` takes those that are ready.
        """
        for worker in self.replicas.maintain():
            self._reassign(worker)
        for worker in self.replicas.leaving:
            if all(awaited.worker != worker for awaited in self._awaited.values()):
                self.replicas.retire(worker)
        return [*self._awaited, *self.replicas.arriving]

    def abandon(self) -> None:
        """Forget all rollouts, and let weights of an earlier policy version follow."""
        self._awaited.clear()
        self._unassigned.clear()
        for worker in self.replicas.serving:
            try:
                answer = self.replicas.actor(worker).abandon.remote()
                waiting_for = f"{self.replicas.name(worker)} to abandon its rollouts"
                self.cluster.get(answer, self._timeouts.call_seconds, waiting_for)
            except PreceptorError as error:  # it died, or an update of its weights never ended
                self.replicas.lose(worker, error)

    def state(self) -> PoolState:
        owed = [assignment.requests for assignment in self._awaited.values()]
        owed += [requests for _, requests, _ in self._unassigned]
        return self.replicas.state(self._name, sum(map(len, owed)))

    def late(self) -> str:
        owing = sorted({awaited.worker for awaited in self._awaited.values()})
        names = [self.replicas.name(worker) for worker in owing]
        return ", ".join(names or [f"{self._name}, of which none serves"] * bool(self._unassigned))

    def generate(self, requests: Sequence[RolloutRequest], sampling: SamplingSettings) -> Iterator[BatchHandle]:
        """Yield every requested trajectory once, in batches, as they finish; nothing else may run."""
        self.submit(next(self._rollout_ids), requests, sampling)
        while self._awaited or self._unassigned:
            ready = self.cluster.wait_for_any(
                self.maintain, self._timeouts.call_seconds, lambda: f"a batch of trajectories from {self.late()}"
            )
            yield from self.collect(ready)

    def _worker_of(self, reference: Any) -> str:
        return self.replicas.name(self._awaited[reference].worker)

    def _take(self, reference: Any, handle: BatchHandle | PreceptorError) -> BatchHandle | None:
        """Return a batch that is there, or nothing when its worker died."""
        awaited = self._awaited[reference]
        if isinstance(handle, ActorDiedError):
            self.replicas.lose(awaited.worker, handle)
            self._reassign(awaited.worker)
            return None
        del self._awaited[reference]
        if isinstance(handle, PreceptorError):
            raise handle
        self.replicas.note_progress(awaited.worker)
        span = Span(
            self._name,
            self.replicas.name(awaited.worker),
            "generate",
            awaited.sent_at,
            perf_counter(),
            len(handle.trajectory_ids),
            sum(handle.num_completion_tokens),
            awaited.rollout,
            handle.num_completion_tokens,
        )
        self._lengths.observe(handle)
        if not handle.is_last:
            came = set(handle.episodes)
            left = [request for request in awaited.requests if request.trajectory_id not in came]
            self._send("next_batch", replace(awaited, requests=left))
        elif self._rests and awaited.rollout >= 0 and not self._awaited and not self._unassigned:
            for actor in self.actors:
                actor.rest.remote(awaited.rollout)
        return replace(handle, reference=awaited.wire, rollout=awaited.rollout, spans=(span,))

    def _reassign(self, worker: int) -> None:
        for reference, owed in list(self._awaited.items()):
            if owed.worker == worker:
                del self._awaited[reference]
                name = self.replicas.name(worker)
                _log.warning("%d trajectories of %s are requested again", len(owed.requests), name)
                self.submit(owed.rollout, owed.requests, owed.sampling)

    def _send(self, method: str, assignment: _Assignment, *args: Any) -> None:
        """Call a worker for the next batch of an assignment; the key is the reference to its handle."""
        call = getattr(self.replicas.actor(assignment.worker), method).options(num_returns=2)
        wire, handle = call.remote(assignment.call, *args)
        self._awaited[handle] = replace(assignment, wire=wire, sent_at=perf_counter())

    def _prepare(self, actor: ActorHandle) -> list[Any]:
        prompts = [] if self._prompts is None else [actor.set_prompts.remote(self._prompts)]
        return prompts + ([self._bring_weights(actor)] if self._bring_weights else [])
