"""The replicas that score for one teacher, or in turns for the teachers of a slot, each of which has a pool of its own.

Importing this loads neither vLLM nor torch: the driver needs none, and an actor sets their environment first.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle

from cluster.contracts.errors import PreceptorError
from cluster.contracts.observation import PoolState
from cluster.contracts.pools import TeacherConfig
from cluster.workers import actors
from cluster.workers.batch_store import STORE_ENVIRONMENT, add_environment
from cluster.workers.replicas import Recipe, Replicas, Supervision
from teacher_workers.actor import SlotActor, TeacherActor

_log = logging.getLogger("preceptor")


class Scorers:
    """Replicas with one engine per teacher each, and how many tokens each has still to score.

    A replica that dies is started again; the pools learn of it by `num_gone` and by what their answers raise.
    """

    def __init__(
        self,
        label: str,
        teachers: Mapping[str, TeacherConfig],
        max_model_len: int,
        options: Sequence[Mapping[str, Any]],
        actor: type | None = None,
        create: Callable[..., list[ActorHandle]] = actors.create_actors,
        supervision: Supervision | None = None,
    ) -> None:
        """Begin to start the actors, called LABEL-0, LABEL-1, ...

        Args:
            label: of the replicas.
            teachers: by name; of several, one at a time is awake.
            max_model_len: tokens of the longest trajectory, plus 1.
            options: Ray's actor options, one entry per actor; where the teachers are to have none yet, one for later.
            actor: another class with TeacherActor's methods, or of several teachers SlotActor's, without engines.
            create: makes the actors, as `create_actors` does.
            supervision: how often dead ones are started again; None: never.
        """
        self.label = label
        self.teachers = dict(teachers)
        self.num_gone = 0  # actors that took their batches with them
        self._loads: Counter[int] = Counter()  # replica -> tokens still to score
        first, *others = self.teachers.values()
        stored = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        recipe = Recipe(
            actor or (SlotActor if others else TeacherActor),
            lambda name: (name, self.teachers if others else first, max_model_len),
            stored if first.num_workers else [],
            create,
            spare=stored[0],
        )
        self._replicas = Replicas(label, recipe, supervision or Supervision())

    def wait_until_ready(self, timeout_seconds: float, waiting_for: str) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve a teacher, or its LM head cannot be read.
            ActorError: an actor died or took too long; says which.
        """
        self._replicas.wait_until_ready(timeout_seconds, waiting_for)

    @property
    def is_shared(self) -> bool:
        """Return whether several teachers take turns."""
        return len(self.teachers) > 1

    @property
    def serving(self) -> dict[int, str]:
        """Return the replicas that take batches, and the names of their actors, which change when they start again."""
        return {replica: self._replicas.actor_name(replica) for replica in self._replicas.serving}

    @property
    def serves(self) -> bool:
        """Return whether a replica takes batches."""
        return bool(self._replicas.serving)

    @property
    def size(self) -> int:
        """Return how many replicas take batches, or will when they have started."""
        return self._replicas.size

    @property
    def is_gone(self) -> bool:
        """Return whether none takes batches, is to come or has anything left to do."""
        return not self.size and not self._replicas.leaving

    @property
    def staying(self) -> list[ActorHandle]:
        """Return the actors that serve, those first that stay when the pool shrinks."""
        return self._replicas.staying

    def resize(self, size: int) -> None:
        """Start replicas, or let some leave when they have scored what they were given; returns at once."""
        self._replicas.resize(size)

    def least_loaded(self) -> int:
        """Return the replica with the fewest tokens to score, of at least one that serves."""
        serving = self._replicas.serving
        return serving[least_loaded([self._loads[replica] for replica in serving])]

    def load(self, replica: int, num_tokens: int) -> None:
        """Note that a replica has so many more tokens to score; fewer, if negative."""
        self._loads[replica] += num_tokens

    def actor(self, replica: int) -> ActorHandle:
        """Return a serving replica's actor."""
        return self._replicas.actor(replica)

    def actor_name(self, replica: int) -> str:
        """Return what a replica's present actor is called."""
        return self._replicas.actor_name(replica)

    def name(self, replica: int) -> str:
        """Return what a replica is called, whichever actor it has."""
        return self._replicas.name(replica)

    def is_served_by(self, replica: int, actor_name: str) -> bool:
        """Return whether the replica serves with this actor still."""
        return self._replicas.is_served_by(replica, actor_name)

    def lose(self, replica: int, actor_name: str, error: PreceptorError) -> None:
        """Replace a dead actor, unless somebody else found it dead before.

        Raises:
            ActorError: the replica died more often than it may.
        """
        self.num_gone += 1
        if self._replicas.is_served_by(replica, actor_name):
            self._replicas.lose(replica, error)

    def fence(self, replica: int, reason: str) -> None:
        """End a replica whose scores are wrong, for good."""
        _log.warning("%s; %s is ended", reason, self._replicas.name(replica))
        self.num_gone += 1
        self._replicas.retire(replica)

    def look_after(self) -> list[Any]:
        """Replace replicas that died unnoticed, start those whose rest is over, and return what starting ones do.

        Raises:
            ActorError: a replica died more often than it may.
        """
        self.num_gone += len(self._replicas.look())
        for replica in self._replicas.leaving:
            if not self._loads[replica]:
                self._replicas.retire(replica)
        return self._replicas.arriving

    def welcome(self, ready: Collection[Any]) -> None:
        """Let replicas serve whose last step of starting is among references that are ready.

        Raises:
            ActorError: a replica died more often than it may.
        """
        self._replicas.welcome(ready)

    def forget_loads(self) -> None:
        """Count as if nothing were to be scored."""
        self._loads.clear()

    def state(self, pool: str, num_owed: int) -> PoolState:
        """Return who serves a pool, which knows what it is owed."""
        return self._replicas.state(pool, num_owed)

    def end(self) -> None:
        """End actors that have nothing to do, started or not; their engines end with them."""
        self.resize(0)
        for replica in self._replicas.leaving:
            self._replicas.retire(replica)

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        self._replicas.shutdown()


def least_loaded(outstanding_tokens: Sequence[int]) -> int:
    """Return the replica with the fewest tokens still to score; the first of equals.

    Example:
        >>> least_loaded([40, 10, 10])
        1
    """
    return min(range(len(outstanding_tokens)), key=outstanding_tokens.__getitem__)
