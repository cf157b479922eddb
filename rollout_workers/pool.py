"""The rollout pool: who is asked for which completions, and what happens when one of them dies."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from time import perf_counter
from typing import Any

from ray.actor import ActorHandle

from cluster.actors.cluster import RAY, Cluster, PoolTimeouts
from cluster.actors.object_store import STORE_ENVIRONMENT, add_environment
from cluster.actors.replicas import Replicas, Supervision
from cluster.contracts.batches import BatchHandle, PoolState, Span
from cluster.contracts.errors import ActorDiedError, PreceptorError
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.actor import RolloutActorSettings
from rollout_workers.prompts import PromptSet
from rollout_workers.scheduling import ExpectedLengths, spread

ROLLOUT_ACTOR = "rollout_workers.actor:RolloutActor"

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class Order:
    """Completions to draw, whoever does it."""

    rollout: int  # in training the step; a worker that cannot run all at once runs those of the lowest number first
    requests: tuple[RolloutRequest, ...]
    sampling: SamplingSettings
    verifier: str  # gives the rewards

    def only(self, trajectory_ids: Iterable[int]) -> "Order":
        """Return the part that asks for these."""
        wanted = set(trajectory_ids)
        return replace(self, requests=tuple(request for request in self.requests if request.trajectory_id in wanted))

    def without(self, trajectory_ids: Iterable[int]) -> "Order":
        """Return what is left when these have been written."""
        written = set(trajectory_ids)
        left = tuple(request for request in self.requests if request.trajectory_id not in written)
        return replace(self, requests=left)


@dataclass(frozen=True)
class _Awaited:
    worker: int
    call: int  # what the worker knows the order by
    order: Order  # without what has been written
    wire: Any  # reference to the next batch's bytes
    asked_at: float = field(default_factory=perf_counter)


class RolloutPool:
    """Spreads requests over rollout actors and hands back batches as they finish anywhere.

    What a dead worker had not written yet is asked of the others, at once; the worker is started again, is given the
    prompts and the current weights, and takes part from then on.
    """

    def __init__(
        self,
        settings: RolloutActorSettings,
        options: Sequence[Mapping[str, Any]],
        timeouts: PoolTimeouts,
        name: str = "rollout",
        cluster: Cluster = RAY,
        supervision: Supervision | None = None,
    ) -> None:
        """Begin to start the actors.

        Args:
            settings: what each is given.
            options: Ray's actor options, one entry per actor.
            timeouts: how long to wait for them.
            name: they are called `name`-0, `name`-1, ...
            cluster: makes the actors and waits for their answers.
            supervision: how often dead ones are started again; None: never.
        """
        self._timeouts = timeouts
        self._name = name
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self.cluster = cluster
        self._replicas = Replicas(name, ROLLOUT_ACTOR, lambda _name: (settings,), options, cluster, supervision)
        self._replicas.prepare_with(self._prepare)
        self._lengths = ExpectedLengths(lambda prompt_id: "")
        self._prompts: Any = None  # reference to the prompts' wire bytes
        self._bring_weights: Callable[[ActorHandle], Any] | None = None
        self._rollout_ids = count(-1, -1)  # below every step, so that who waits for `generate` waits for it alone
        self._calls = count()
        self._awaited: dict[Any, _Awaited] = {}  # reference to a handle -> who owes it
        self._unassigned: list[Order] = []  # nobody serves who could do them

    @property
    def actors(self) -> list[ActorHandle]:
        """Return the actors whose weights are kept current; the learner's sender calls their weight verbs."""
        return self._replicas.prepared

    def wait_until_ready(self) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve the model.
            ActorError: an actor died or took too long; says which.
        """
        self._replicas.wait_until_ready(self._timeouts.start_seconds, f"pool {self._name} to start")

    def set_prompts(self, prompts: PromptSet) -> None:
        """Give every actor the prompts; their bytes go into the object store once."""
        self._prompts = self.cluster.put(prompts.to_wire())
        self.cluster.call_all(
            self.actors,
            "set_prompts",
            self._prompts,
            timeout_seconds=self._timeouts.call_seconds,
            waiting_for=f"set_prompts in pool {self._name}",
            names=[self._replicas.name(worker) for worker in self._replicas.serving],
        )
        self._lengths = ExpectedLengths(prompts.domain)

    @property
    def size(self) -> int:
        """Return how many workers take requests, or will when they have started."""
        return self._replicas.size

    @property
    def staying(self) -> list[ActorHandle]:
        """Return the actors that serve, those first that stay when the pool shrinks."""
        return self._replicas.staying

    def resize(self, size: int) -> None:
        """Start workers, or let some leave when they have written what they were asked for; returns at once.

        New ones are given the prompts and the current weights, and take part in what is submitted from then on.
        """
        self._replicas.resize(size)

    def bring_weights_with(self, bring: Callable[[ActorHandle], Any]) -> None:
        """Set how a worker that was started again gets the current weights; returns a reference that is ready then."""
        self._bring_weights = bring

    def submit(self, order: Order) -> None:
        """Hand requests to the workers that serve, those expected to be long first, and return at once."""
        serving = self._replicas.serving
        if not serving:
            self._unassigned.append(order)
            return
        for worker, share in zip(serving, spread(order.requests, len(serving), self._lengths.expect), strict=True):
            if share:
                call = next(self._calls)
                given = replace(order, requests=tuple(share))
                self._ask(
                    worker, call, given, "start_rollout", call, share, order.sampling, order.verifier, order.rollout
                )

    def collect(self, ready: Collection[Any]) -> list[BatchHandle]:
        """Return the batches among references that are ready, and ask their workers for the next ones, if any.

        References that are not of this pool are passed over.

        Raises:
            RolloutError: an engine gave up a request.
            ActorError: workers died more often than they may.
        """
        taken = (self._take(reference) for reference in ready if reference in self._awaited)
        handles = [handle for handle in taken if handle is not None]
        if self._replicas.admit_started(ready):
            orders, self._unassigned = self._unassigned, []
            for order in orders:
                self.submit(order)
        return handles

    def maintain(self) -> list[Any]:
        """Replace workers that died unnoticed, start those whose rest is over, and return references to wait for.

        They are of batches that are owed, and of what starting workers do; `collect` takes those that are ready.

        Raises:
            ActorError: workers died more often than they may.
        """
        for worker in self._replicas.maintain():
            self._hand_on(worker)
        for worker in self._replicas.leaving:
            if all(awaited.worker != worker for awaited in self._awaited.values()):
                self._replicas.retire(worker)
        return [*self._awaited, *self._replicas.arriving]

    def abandon(self) -> None:
        """Forget all rollouts, and let weights of an earlier policy version follow.

        Raises:
            ActorError: workers died more often than they may.
        """
        self._awaited.clear()
        self._unassigned.clear()
        for worker in self._replicas.serving:
            try:
                answer = self._replicas.actor(worker).abandon.remote()
                waiting_for = f"{self._replicas.name(worker)} to abandon its rollouts"
                self.cluster.get(answer, self._timeouts.call_seconds, waiting_for)
            except PreceptorError as error:  # it died, or an update of its weights never ended
                self._replicas.lose(worker, error)

    def state(self) -> PoolState:
        """Return who serves, and how many completions are owed."""
        orders = [*(awaited.order for awaited in self._awaited.values()), *self._unassigned]
        return self._replicas.state(self._name, sum(len(order.requests) for order in orders))

    def late(self) -> str:
        """Name the workers that owe a batch, or are on their way."""
        owing = sorted({awaited.worker for awaited in self._awaited.values()})
        names = [self._replicas.name(worker) for worker in owing]
        return ", ".join(names or [f"{self._name}, of which nobody serves"] * bool(self._unassigned))

    def generate(
        self, requests: Sequence[RolloutRequest], sampling: SamplingSettings, verifier: str
    ) -> Iterator[BatchHandle]:
        """Yield every requested trajectory once, in batches, in the order in which they finish; nothing else may run.

        Raises:
            RolloutError: an engine gave up a request.
            ActorError: an actor died, or none finished a batch in time; says which are late.
        """
        self.submit(Order(next(self._rollout_ids), tuple(requests), sampling, verifier))
        while self._awaited or self._unassigned:
            ready = self.cluster.wait_for_any(self.maintain, self._timeouts.call_seconds, self._waited_for)
            yield from self.collect(ready)

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        self._replicas.shutdown()

    def _waited_for(self) -> str:
        return f"a batch of trajectories from {self.late()}"

    def _take(self, reference: Any) -> BatchHandle | None:
        """Return a batch that is there, or nothing when its worker died."""
        awaited = self._awaited.pop(reference)
        waiting_for = f"a batch from {self._replicas.name(awaited.worker)}"
        try:
            handle: BatchHandle = self.cluster.get(reference, self._timeouts.call_seconds, waiting_for)
        except ActorDiedError as error:
            self._awaited[reference] = awaited
            self._replicas.lose(awaited.worker, error)
            self._hand_on(awaited.worker)
            return None
        span = self._span(awaited, handle)
        self._lengths.observe(handle)
        if not handle.is_last:
            left = awaited.order.without(handle.trajectory_ids)
            self._ask(awaited.worker, awaited.call, left, "next_batch", awaited.call)
        return replace(handle, reference=awaited.wire, rollout=awaited.order.rollout, spans=(span,))

    def _span(self, awaited: _Awaited, handle: BatchHandle) -> Span:
        return Span(
            self._name,
            self._replicas.name(awaited.worker),
            "generate",
            awaited.asked_at,
            perf_counter(),
            len(handle.trajectory_ids),
            sum(handle.num_completion_tokens),
            awaited.order.rollout,
            handle.num_completion_tokens,
        )

    def _hand_on(self, worker: int) -> None:
        """Ask others for what a lost worker owes."""
        owed = {reference: awaited for reference, awaited in self._awaited.items() if awaited.worker == worker}
        for reference in owed:
            del self._awaited[reference]
        name = self._replicas.name(worker)
        for awaited in owed.values():
            _log.warning("%d completions of %s are asked for again", len(awaited.order.requests), name)
            self.submit(awaited.order)

    def _ask(self, worker: int, call: int, order: Order, method: str, *args: Any) -> None:
        """Ask a worker for a batch; the key is the reference to its handle."""
        wire, handle = getattr(self._replicas.actor(worker), method).options(num_returns=2).remote(*args)
        self._awaited[handle] = _Awaited(worker, call, order, wire)

    def _prepare(self, actor: ActorHandle) -> list[Any]:
        prompts = [] if self._prompts is None else [actor.set_prompts.remote(self._prompts)]
        return prompts + ([self._bring_weights(actor)] if self._bring_weights else [])
