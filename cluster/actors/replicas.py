"""Starts, drains and restarts the actors of one pool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.actors.cluster import Cluster, PoolTimeouts
from cluster.actors.liveness import Watch
from cluster.actors.restarts import RestartBudget, RestartLimit
from cluster.contracts.batches import PoolState
from cluster.contracts.errors import ActorDiedError, ActorError, PreceptorError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

NO_RESTARTS = RestartLimit(max_restarts=0, window_seconds=1.0)

_log = logging.getLogger("preceptor")


@dataclass(frozen=True)
class Supervision:
    """Sets how a pool deals with dead actors."""

    restarts: RestartLimit = NO_RESTARTS
    watch: Watch | None = None  # None: a caller that waits for an answer notices the death


def unplanned_options(option: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a replica that has no planned place: it goes where resources are free, spread out.

    Example:
        >>> unplanned_options({"num_cpus": 1.0, "num_gpus": 0, "scheduling_strategy": "DEFAULT"})
        {'num_cpus': 0, 'num_gpus': 0, 'scheduling_strategy': 'SPREAD'}
        >>> unplanned_options({"num_cpus": 0.5, "num_gpus": 0.3, "scheduling_strategy": "where the others are"})
        {'num_cpus': 0.5, 'num_gpus': 0.3, 'scheduling_strategy': 'where the others are'}
    """
    if 0 < option.get("num_gpus", 0) < 1:
        return dict(option)  # the GPU that the run shares is on the same node
    # Without GPUs, all share the same cores in turns, and the first replicas have reserved them.
    free = {} if option.get("num_gpus") else {"num_cpus": 0}
    return {**option, **free, "scheduling_strategy": "SPREAD"}


@dataclass(frozen=True)
class _Member:
    """Holds a replica's present actor. It starts, is prepared, and serves; or rests before it starts again."""

    name: str
    actor: ActorHandle | None  # None: it rests
    due: float = 0.0  # when it rests no longer, on the clock of `monotonic`
    waits_for: tuple[Any, ...] = ()  # references to what it does before it serves
    is_prepared: bool = False  # whether `waits_for` is the last of it

    @property
    def serves(self) -> bool:
        return self.actor is not None and not self.waits_for


class Replicas:
    """Keeps the actors of a pool, any of which may die; replica 2 of `rollout` is called rollout-2.

    Only `wait_until_ready` blocks: a replica that is started later serves once `admit_started` has seen the last of its
    `arriving` references.
    """

    def __init__(
        self,
        label: str,
        actor_class: str,
        arguments: Callable[[str], tuple[Any, ...]],
        options: Sequence[Mapping[str, Any]],
        cluster: Cluster,
        supervision: Supervision | None = None,
        spare: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin to start one actor per entry of `options`, which are Ray's; `spare` has those of later replicas.

        `actor_class` is "package.module:Class", whose method `start` is called once. `arguments` returns those of its
        constructor, by the actor's name.
        """
        self._label, self._actor_class, self._arguments = label, actor_class, arguments
        self._options, self._spare = options, spare
        self._cluster = cluster
        self._supervision = supervision = supervision or Supervision()
        self._budget = RestartBudget(supervision.restarts)
        self.num_restarts = 0
        self._prepare: Callable[[ActorHandle], list[Any]] = lambda actor: []
        names = [self.name(replica) for replica in range(len(options))]
        made = cluster.create(actor_class, names, [arguments(name) for name in names], options)
        self._members = {
            replica: _Member(name, actor, waits_for=(actor.start.remote(),))
            for replica, (name, actor) in enumerate(zip(names, made, strict=True))
        }
        self._next_replica = len(names)
        self._leaving: set[int] = set()  # they take no more work
        self._absent = set(self._members)  # they rest or start; few, so that checking them costs little

    def wait_until_ready(self, timeout_seconds: float, waiting_for: str) -> None:
        """Wait for every actor's first start; raise what one raised, or ActorError for one that died or is late."""
        started = [reference for member in self._members.values() for reference in member.waits_for]
        names = [member.name for member in self._members.values()]
        self._cluster.get(started, timeout_seconds, waiting_for, names)
        for replica in list(self._absent):
            self._let_serve(replica)

    def prepare_with(self, prepare: Callable[[ActorHandle], list[Any]]) -> None:
        """Set what is sent to a restarted actor before it serves; `prepare` returns references to wait for."""
        self._prepare = prepare

    @property
    def serving(self) -> list[int]:
        away = self._absent | self._leaving
        return [replica for replica in self._members if replica not in away] if away else list(self._members)

    @property
    def staying(self) -> list[ActorHandle]:
        """Return the actors that serve and do not leave, those first that stay when the pool shrinks."""
        return [self.actor(replica) for replica in sorted(self.serving)]

    @property
    def leaving(self) -> list[int]:
        """Return the replicas that take no more work; `retire` them when they have done what they were given."""
        return sorted(self._leaving)

    @property
    def size(self) -> int:
        """Return how many replicas take work, or will when they have started."""
        return len(self._members) - len(self._leaving)

    def state(self, pool: str, num_owed: int) -> PoolState:
        serving = [self.name(replica) for replica in self.serving]
        return PoolState(pool, serving, self.size, self.num_restarts, num_owed)

    @property
    def prepared(self) -> list[ActorHandle]:
        """Return the actors that serve, or were sent all that they need before they do."""
        return [
            member.actor for member in self._members.values() if member.actor and (member.serves or member.is_prepared)
        ]

    @property
    def arriving(self) -> list[Any]:
        """Return references to wait for; `admit_started` takes those that are ready."""
        return [reference for replica in self._absent for reference in self._members[replica].waits_for]

    def actor(self, replica: int) -> ActorHandle:
        actor = self._members[replica].actor
        assert actor is not None, "a resting replica has no actor"
        return actor

    def is_served_by(self, replica: int, actor_name: str) -> bool:
        """Return whether the replica still serves with this actor."""
        member = self._members.get(replica)
        return member is not None and member.serves and member.name == actor_name

    def actor_name(self, replica: int) -> str:
        """Return what a replica's present actor is called."""
        return self._members[replica].name

    def name(self, replica: int) -> str:
        """Return what a replica is called, whichever actor it has."""
        return f"{self._label}-{replica}"

    def resize(self, size: int) -> None:
        """Start replicas, or let some leave, until `size` of them take work or are on their way."""
        staying = [replica for replica in self._members if replica not in self._leaving]
        for _ in range(size - len(staying)):
            self._start(self._next_replica, self.name(self._next_replica))
            self._next_replica += 1
        # Those that serve and those that came first stay.
        for replica in sorted(staying, key=lambda replica: (not self._members[replica].serves, replica))[size:]:
            if self._members[replica].serves:
                self._leaving.add(replica)
            else:
                self.retire(replica)

    def admit_started(self, ready: Collection[Any]) -> list[int]:
        """Move replicas on whose `arriving` references are ready, and return those that serve from now on."""
        arrived = []
        for replica in list(self._absent):
            member = self._members[replica]
            came = [reference for reference in member.waits_for if reference in ready]
            if came and self._move_on(replica, member, came):
                arrived.append(replica)
        return arrived

    def maintain(self) -> list[int]:
        """Start those that have rested, and restart serving replicas that died; return the latter."""
        now = time.monotonic()
        for replica in list(self._absent):
            member = self._members[replica]
            if member.actor is None and member.due <= now:
                self._start_again(replica)
        watch = self._supervision.watch
        lost = watch.lost if watch else ()
        dead = [replica for replica, member in self._members.items() if member.name in lost] if lost else []
        for replica in dead:
            gone = ActorDiedError(f"{self._members[replica].name} died or fell silent")
            self.lose(replica, self._cluster.explain(gone, self.actor(replica)))
        return dead

    def lose(self, replica: int, error: PreceptorError) -> None:
        """End a failed actor and start another, at once or after a delay; raise ActorError if none may be started."""
        if replica in self._leaving:
            self.retire(replica)
            return
        try:
            delay = self._budget.take(replica, self.name(replica), error)
        except ActorError:
            self.retire(replica)
            raise
        _log.warning("%s; it is started again%s", error, f" in {delay:.0f} s" if delay else "")
        self._end(replica)
        self._absent.add(replica)
        self._members[replica] = replace(self._members[replica], actor=None, due=time.monotonic() + delay, waits_for=())
        if not delay:
            self._start_again(replica)

    def note_progress(self, replica: int) -> None:
        """Note that a replica has done some of its work, so that it may be started again after any error."""
        self._budget.note_progress(replica)

    def retire(self, replica: int) -> None:
        self._end(replica)
        del self._members[replica]
        self._leaving.discard(replica)
        self._absent.discard(replica)

    def shutdown(self) -> None:
        for member in self._members.values():
            self._forget(member)
        self._cluster.shutdown([member.actor for member in self._members.values() if member.actor])

    def _start_again(self, replica: int) -> None:
        # Ray may hold a dead actor's name for a while yet, so the next one has a number of its own.
        self.num_restarts += 1
        self._start(replica, f"{self.name(replica)}-again-{self.num_restarts}")

    def _start(self, replica: int, name: str) -> None:
        is_planned = replica < len(self._options)
        option = self._options[replica] if is_planned else unplanned_options(self._spare or self._options[0])
        [actor] = self._cluster.create(self._actor_class, [name], [self._arguments(name)], [option])
        self._members[replica] = _Member(name, actor, waits_for=(actor.start.remote(),))
        self._absent.add(replica)

    def _move_on(self, replica: int, member: _Member, came: Iterable[Any]) -> bool:
        """Take the answers that a replica waited for, and return whether it serves now."""
        assert member.actor is not None
        left = tuple(reference for reference in member.waits_for if reference not in came)
        try:
            for reference in came:
                self._cluster.get(reference, 0, f"{member.name} to start again")
            if not left and not member.is_prepared:
                left = tuple(self._prepare(member.actor))
                member = replace(member, is_prepared=True)
        except PreceptorError as error:
            self.lose(replica, error)
            return False
        self._members[replica] = replace(member, waits_for=left)
        if not left:
            self._let_serve(replica)
        return not left

    def _let_serve(self, replica: int) -> None:
        member = self._members[replica] = replace(self._members[replica], waits_for=())
        self._absent.discard(replica)
        if self._supervision.watch and member.actor:
            self._supervision.watch.add(member.name, member.actor)

    def _end(self, replica: int) -> None:
        member = self._members[replica]
        self._forget(member)
        if member.actor:
            self._cluster.kill(member.actor)

    def _forget(self, member: _Member) -> None:
        if self._supervision.watch:
            self._supervision.watch.forget(member.name)


class Pool:
    """Holds what is common to the pools of rollout and teacher workers."""

    def __init__(self, label: str, replicas: Replicas, timeouts: PoolTimeouts) -> None:
        self._label, self.replicas, self._timeouts = label, replicas, timeouts

    def wait_until_ready(self) -> None:
        """Wait for every replica; the errors are those of `Replicas.wait_until_ready`."""
        self.replicas.wait_until_ready(self._timeouts.start_seconds, f"{self._label} to start")

    @property
    def size(self) -> int:
        return self.replicas.size

    @property
    def staying(self) -> list[ActorHandle]:
        """Return the actors that serve, those first that stay when the pool shrinks."""
        return self.replicas.staying

    def resize(self, size: int) -> None:
        """Start replicas, or let some leave when they have done what they were given; returns at once."""
        self.replicas.resize(size)

    def shutdown(self) -> None:
        self.replicas.shutdown()
