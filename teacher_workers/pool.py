"""The teacher pools: per teacher, Ray actors with one TeacherWorker each. The only file here that knows Ray.

Importing this loads neither vLLM nor torch: the driver needs none, and an actor sets their environment first.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster import actors
from cluster.actors import PoolTimeouts
from cluster.batch_store import STORE_ENVIRONMENT, add_environment
from cluster.contracts.config import TeacherConfig
from cluster.contracts.errors import ActorDiedError, ActorError, ScoreError
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from teacher_workers.actor import TeacherActor

_log = logging.getLogger("preceptor")

Chain = Sequence[tuple[str, ScoreRequest]]  # who scores a batch, in order, and what is asked of each: pool, request
Ticket = Any  # ray.ObjectRef of an answer, to wait for and to collect it by


@dataclass(frozen=True)
class _Assignment:
    replica: int
    handle: BatchHandle  # as it was sent
    request: ScoreRequest
    wire: Any  # reference to the scored batch's bytes

    @property
    def num_tokens(self) -> int:
        return sum(self.handle.num_tokens)


@dataclass(frozen=True)
class _Leg:
    pool: "TeacherPool"  # scores now
    rest: Chain  # scores after it


class TeacherPool:
    """The replicas of one teacher; each batch goes to the one with the fewest tokens still to score.

    A replica that dies is started again, and its batches go to the others meanwhile.
    """

    def __init__(
        self,
        name: str,
        teacher: TeacherConfig,
        max_model_len: int,
        options: Sequence[Mapping[str, Any]],
        timeouts: PoolTimeouts,
        actor: type = TeacherActor,
        create: Callable[..., list[ActorHandle]] = actors.create_actors,
        max_restarts: int = 0,
    ) -> None:
        """Begin to start the actors, called teacher-NAME-0, teacher-NAME-1, ...

        Args:
            name: of the teacher.
            teacher: what each is given.
            max_model_len: tokens of the longest trajectory, plus 1.
            options: Ray's actor options, one entry per actor.
            timeouts: how long to wait for them.
            actor: another class with TeacherActor's methods, to run the pool without its engines.
            create: makes the actors, as `create_actors` does.
            max_restarts: how many replicas may die before the pool gives up.
        """
        self.name = name
        self._names = [f"teacher-{name}-{index}" for index in range(len(options))]
        self._timeouts = timeouts
        arguments = [(actor_name, teacher, max_model_len) for actor_name in self._names]
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self._actors = create(actor, self._names, arguments, options)
        again = count(1)
        # Ray may hold a dead actor's name for a while yet, so the next one has a number of its own.
        self._create_again: Callable[[int], ActorHandle] = lambda replica: create(
            actor, [f"{self._names[replica]}-again-{next(again)}"], [arguments[replica]], [options[replica]]
        )[0]
        self._restarts_left = max_restarts
        # Replicas that do not serve yet, or not any more until they have started again.
        self._starting = {replica: actor.start.remote() for replica, actor in enumerate(self._actors)}
        self._outstanding: dict[Ticket, _Assignment] = {}
        self._loads = [0] * len(self._actors)  # tokens still to score, of each replica

    def wait_until_ready(self) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve the teacher, or its LM head cannot be read.
            ActorError: an actor died or took too long; says which.
        """
        waiting_for = f"teacher {self.name} to start"
        actors.get_all(list(self._starting.values()), self._timeouts.start_seconds, waiting_for, self._names)
        self._starting = {}

    def submit(self, handle: BatchHandle, request: ScoreRequest) -> Ticket:
        """Send a batch to the least loaded replica; returns at once unless none serves.

        Raises:
            ActorError: no replica serves, and those that start again died or took too long.
        """
        serving = self._serving()
        replica = serving[least_loaded([self._loads[index] for index in serving])]
        wire, ticket = self._score(replica, handle, request)
        self._outstanding[ticket] = _Assignment(replica, handle, request, wire)
        self._loads[replica] += self._outstanding[ticket].num_tokens
        return ticket

    def collect(self, ticket: Ticket) -> BatchHandle:
        """Return the scored batch, waiting for it.

        Raises:
            ScoreError: the replica's scores cannot be training data; names teacher and replica.
            ActorDiedError: the replica died; `reassign` sends the batch elsewhere.
            ActorError: the replica took too long.
        """
        assignment = self._outstanding[ticket]
        waiting_for = f"scores from {self._names[assignment.replica]}"
        scored: BatchHandle = actors.get(ticket, self._timeouts.call_seconds, waiting_for)
        self._forget(ticket)
        metrics = {**assignment.handle.metrics, **scored.metrics}
        return replace(scored, reference=assignment.wire, rollout=assignment.handle.rollout, metrics=metrics)

    def reassign(self, ticket: Ticket, error: ActorDiedError) -> dict[Ticket, Ticket]:
        """Start the replica that owes this answer again, and send all its batches elsewhere.

        Args:
            ticket: of a batch whose replica died.
            error: how it did.

        Returns:
            The tickets of the batches that it had, and which take their places.

        Raises:
            ActorError: as many replicas died as may, or none is left that serves.
        """
        replica = self._outstanding[ticket].replica
        self._start_again(replica, error)
        orphans = [owed for owed, assignment in self._outstanding.items() if assignment.replica == replica]
        moved = {owed: self._forget(owed) for owed in orphans}
        return {owed: self.submit(assignment.handle, assignment.request) for owed, assignment in moved.items()}

    def score_everywhere(self, handles: Sequence[BatchHandle], request: ScoreRequest) -> list[list[BatchHandle]]:
        """Score the same batches on every replica, to compare them; one list per replica, in the batches' order."""
        everywhere = []
        for replica, name in enumerate(self._names):
            asked = [self._score(replica, handle, request) for handle in handles]
            waiting_for = f"scores from {name}"
            scored = actors.get([answer for _, answer in asked], self._timeouts.call_seconds, waiting_for)
            everywhere.append(
                [replace(handle, reference=wire) for handle, (wire, _) in zip(scored, asked, strict=True)]
            )
        return everywhere

    def late(self) -> str:
        """Name the replicas that owe an answer."""
        return ", ".join(self._names[index] for index in sorted({a.replica for a in self._outstanding.values()}))

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        actors.shutdown(self._actors)

    def _serving(self) -> list[int]:
        """Return the replicas that serve, at least one; those that have started again are among them from now on."""
        patience = 0.0
        while True:
            starting = list(self._starting.values())
            ready = ray.wait(starting, num_returns=1, timeout=patience)[0] if starting else []
            if patience and not ready:
                raise ActorError(f"waited {patience:.0f} s for a replica of teacher {self.name} to start again")
            for replica in [replica for replica, reference in self._starting.items() if reference in ready]:
                self._welcome(replica)
            serving = [replica for replica in range(len(self._actors)) if replica not in self._starting]
            if serving:
                return serving
            patience = self._timeouts.start_seconds

    def _welcome(self, replica: int) -> None:
        """Let a replica serve that has started again, or start it once more."""
        try:
            actors.get(self._starting[replica], 0, f"{self._names[replica]} to start again")
            del self._starting[replica]
        except ActorDiedError as error:
            self._start_again(replica, error)

    def _start_again(self, replica: int, error: ActorDiedError) -> None:
        if not self._restarts_left:
            raise ActorError(f"{error}; no restarts are left for teacher {self.name} (ray.max_restarts)") from error
        self._restarts_left -= 1
        _log.warning("%s; it is started again, and its batches go to the other replicas", error)
        self._actors[replica] = self._create_again(replica)
        self._starting[replica] = self._actors[replica].start.remote()

    def _forget(self, ticket: Ticket) -> _Assignment:
        assignment = self._outstanding.pop(ticket)
        self._loads[assignment.replica] -= assignment.num_tokens
        return assignment

    def _score(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Ticket]:
        """Return references to the scored bytes and to their handle."""
        wire, answer = self._actors[replica].score.options(num_returns=2).remote(handle.reference, request)
        return wire, answer


class TeacherPools:
    """All teachers of a run; each batch goes from pool to pool along its chain, and each adds its columns.

    `score` is the whole of it for who has nothing else to wait for. A driver that waits for new batches at the same
    time uses the three parts: `submit`, then `ray.wait` on `outstanding` and whatever else, then `collect`.
    """

    def __init__(self, pools: Mapping[str, TeacherPool], call_seconds: float) -> None:
        """Take the pools by teacher name; `call_seconds` bounds the wait for the next answer."""
        self._pools = pools
        self._call_seconds = call_seconds
        self._legs: dict[Ticket, _Leg] = {}

    @property
    def pools(self) -> Mapping[str, TeacherPool]:
        """Return the pools by teacher name."""
        return self._pools

    @property
    def outstanding(self) -> list[Ticket]:
        """Return references to wait on: one per batch that is being scored, ready when its present pool is done."""
        return list(self._legs)

    def score(self, handles: Iterable[BatchHandle], plan: Callable[[str], Chain]) -> Iterator[BatchHandle]:
        """Submit each batch as it comes and yield those whose chain is done, in any order.

        Args:
            handles: generated batches.
            plan: gives the chain of a batch's route, `handle.teacher`.

        Raises:
            ScoreError: a chain names an unknown teacher, or scores cannot be training data.
            ActorError: a replica died, or nothing was scored in time; says what is late.
        """
        for handle in handles:
            self.submit(handle, plan(handle.teacher))
            yield from self.collect(ray.wait(self.outstanding, num_returns=len(self._legs), timeout=0)[0])
        while self._legs:
            ready, _ = ray.wait(self.outstanding, num_returns=1, timeout=self._call_seconds)
            if not ready:
                raise ActorError(f"waited {self._call_seconds:.0f} s for scores from {self.late()}")
            yield from self.collect(ready)

    def submit(self, handle: BatchHandle, chain: Chain) -> None:
        """Send a batch to the first pool of its chain, of at least one; returns at once.

        Raises:
            ScoreError: the chain names an unknown teacher.
        """
        for name, _ in chain:
            if name not in self._pools:
                raise ScoreError(f"a batch names the teacher {name!r}; there are {sorted(self._pools)}")
        (name, request), *rest = chain
        pool = self._pools[name]
        self._legs[pool.submit(handle, request)] = _Leg(pool, rest)

    def collect(self, ready: Iterable[Any]) -> list[BatchHandle]:
        """Return the batches whose chain is done, and send the others on.

        Args:
            ready: references that are ready; those that are not `outstanding` here are passed over.

        Raises:
            ScoreError: scores cannot be training data; names teacher and replica.
            ActorError: a replica died.
        """
        finished = []
        for ticket in ready:
            leg = self._legs.get(ticket)
            if leg is None:
                continue
            try:
                handle = leg.pool.collect(ticket)
            except ActorDiedError as error:
                for old, new in leg.pool.reassign(ticket, error).items():
                    self._legs[new] = self._legs.pop(old)
                continue
            del self._legs[ticket]
            if leg.rest:
                self.submit(handle, leg.rest)
            else:
                finished.append(handle)
        return finished

    def late(self) -> str:
        """Name the replicas that owe an answer."""
        return ", ".join(names for pool in self._pools.values() if (names := pool.late()))

    def shutdown(self) -> None:
        """End every pool."""
        for pool in self._pools.values():
            pool.shutdown()


def least_loaded(outstanding_tokens: Sequence[int]) -> int:
    """Return the replica with the fewest tokens still to score; the first of equals.

    Example:
        >>> least_loaded([40, 10, 10])
        1
    """
    return min(range(len(outstanding_tokens)), key=outstanding_tokens.__getitem__)
