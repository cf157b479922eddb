"""One teacher's pool: its batches at the replicas that score for it, of which any may die.

Importing this loads neither vLLM nor torch: the driver needs none, and an actor sets their environment first.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from ray.actor import ActorHandle

from cluster.actors.cluster import RAY, Cluster, PoolTimeouts
from cluster.actors.object_store import STORE_ENVIRONMENT, add_environment
from cluster.actors.replicas import Replicas, Supervision
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle, PoolState, Span
from cluster.contracts.errors import ActorDiedError, LostBytesError, PreceptorError
from cluster.contracts.metrics import merge
from cluster.contracts.requests import ScoreRequest

TEACHER_ACTOR = "teacher_workers.actor:TeacherActor"
SLOT_ACTOR = "teacher_workers.time_sharing:SlotActor"

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
        cluster: Cluster = RAY,
        supervision: Supervision | None = None,
    ) -> None:
        """Begin to start the actors, called LABEL-0, LABEL-1, ...

        Args:
            label: of the replicas.
            teachers: by name; of several, one at a time is awake.
            max_model_len: tokens of the longest trajectory, plus 1.
            options: Ray's actor options, one entry per actor; where the teachers are to have none yet, one for later.
            cluster: makes the actors and waits for their answers.
            supervision: how often dead ones are started again; None: never.
        """
        self.label = label
        self.teachers = dict(teachers)
        self.num_gone = 0  # actors that took their batches with them
        self._loads: Counter[int] = Counter()  # replica -> tokens still to score
        first, *others = self.teachers.values()
        stored = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        self.cluster = cluster
        self._replicas = Replicas(
            label,
            SLOT_ACTOR if others else TEACHER_ACTOR,
            lambda name: (name, self.teachers if others else first, max_model_len),
            stored if first.num_workers else [],
            cluster,
            supervision,
            spare=stored[0],
        )

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

    def quarantine(self, replica: int, reason: str) -> None:
        """End a replica whose scores are wrong, for good."""
        _log.warning("%s; %s is ended", reason, self._replicas.name(replica))
        self.num_gone += 1
        self._replicas.retire(replica)

    def maintain(self) -> list[Any]:
        """Replace replicas that died unnoticed, start those whose rest is over, and return what starting ones do.

        Raises:
            ActorError: a replica died more often than it may.
        """
        self.num_gone += len(self._replicas.maintain())
        for replica in self._replicas.leaving:
            if not self._loads[replica]:
                self._replicas.retire(replica)
        return self._replicas.arriving

    def admit_started(self, ready: Collection[Any]) -> None:
        """Let replicas serve whose last step of starting is among references that are ready.

        Raises:
            ActorError: a replica died more often than it may.
        """
        self._replicas.admit_started(ready)

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


Ticket = Any  # ray.ObjectRef of an answer, to wait for and to collect it by


@dataclass(frozen=True)
class _Assignment:
    replica: int
    actor_name: str
    handle: BatchHandle  # as it was sent
    wire: Any  # reference to the scored batch's bytes
    asked_at: float = field(default_factory=perf_counter)

    @property
    def num_tokens(self) -> int:
        return sum(self.handle.num_tokens)


def start_pool(
    name: str,
    teacher: TeacherConfig,
    max_model_len: int,
    options: Sequence[Mapping[str, Any]],
    timeouts: PoolTimeouts,
    cluster: Cluster = RAY,
    supervision: Supervision | None = None,
) -> "TeacherPool":
    """Begin to start a teacher's own replicas, called teacher-NAME-0, teacher-NAME-1, ...; else as in Scorers."""
    scorers = Scorers(f"teacher-{name}", {name: teacher}, max_model_len, options, cluster, supervision)
    return TeacherPool(name, scorers, timeouts)


class TeacherPool:
    """The batches of one teacher; each goes to the replica with the fewest tokens still to score.

    A replica that dies is started again; what it owed is lost, and is to be submitted once more.
    """

    def __init__(self, name: str, scorers: Scorers, timeouts: PoolTimeouts, checkpoint: str = "") -> None:
        """Take a teacher's place at its replicas.

        Args:
            name: of the teacher.
            scorers: have an engine of it each.
            timeouts: how long to wait for them.
            checkpoint: fingerprint of its files; "": not known yet.
        """
        self.name = name
        self.scorers = scorers
        self.checkpoint = checkpoint
        self._timeouts = timeouts
        self._outstanding: dict[Ticket, _Assignment] = {}
        self._lost: list[Ticket] = []
        self._gone_seen = 0

    @property
    def teacher(self) -> TeacherConfig:
        """Return what its engines were given."""
        return self.scorers.teachers[self.name]

    def wait_until_ready(self) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve the teacher, or its LM head cannot be read.
            ActorError: an actor died or took too long; says which.
        """
        self.scorers.wait_until_ready(self._timeouts.start_seconds, f"teacher {self.name} to start")

    @property
    def serves(self) -> bool:
        """Return whether a replica takes batches."""
        return self.scorers.serves

    @property
    def size(self) -> int:
        """Return how many replicas take batches, or will when they have started."""
        return self.scorers.size

    @property
    def staying(self) -> list[ActorHandle]:
        """Return the actors that serve, those first that stay when the pool shrinks."""
        return self.scorers.staying

    def resize(self, size: int) -> None:
        """Start replicas, or let some leave when they have scored what they were given; returns at once."""
        self.scorers.resize(size)

    def serving(self) -> dict[int, str]:
        """Return the replicas that take batches, and the names of their actors, which change when they start again."""
        return self.scorers.serving

    def ask(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Any]:
        """Let one replica score a batch beside its work; return references to the scored bytes and to their handle."""
        return self._score(replica, handle, request)

    def quarantine(self, replica: int, reason: str) -> None:
        """End a replica whose scores are wrong, for good; its batches are lost, and to be submitted once more."""
        self.scorers.quarantine(replica, reason)
        self.maintain()

    def submit(self, handle: BatchHandle, request: ScoreRequest) -> Ticket:
        """Send a batch to the least loaded replica that serves, of at least one; returns at once."""
        replica = self.scorers.least_loaded()
        wire, ticket = self._score(replica, handle, request)
        self._outstanding[ticket] = _Assignment(replica, self.scorers.actor_name(replica), handle, wire)
        self.scorers.load(replica, self._outstanding[ticket].num_tokens)
        return ticket

    def collect(self, ticket: Ticket) -> BatchHandle | None:
        """Return the scored batch, waiting for it; None when its replica died.

        Raises:
            ScoreError: the replica's scores cannot be training data; names teacher and replica.
            LostBytesError: the batch is gone with the node that held it; the ticket is forgotten.
            ActorError: the replica took too long, or died more often than it may.
        """
        assignment = self._outstanding[ticket]
        waiting_for = f"scores from {self.scorers.name(assignment.replica)}"
        try:
            scored: BatchHandle = self.scorers.cluster.get(ticket, self._timeouts.call_seconds, waiting_for)
        except ActorDiedError as error:
            self.scorers.lose(assignment.replica, assignment.actor_name, error)
            self.maintain()
            return None
        except LostBytesError:
            self._forget(ticket)
            raise
        self._forget(ticket)
        sent = assignment.handle
        return replace(
            scored,
            reference=assignment.wire,
            rollout=sent.rollout,
            metrics=merge((sent.metrics, scored.metrics)),
            spans=(*sent.spans, self._span(assignment)),
            scored_by={**sent.scored_by, **({self.name: self.checkpoint} if self.checkpoint else {})},
        )

    def maintain(self) -> None:
        """Make lost what replicas owe that are gone."""
        if self._gone_seen == self.scorers.num_gone:
            return
        self._gone_seen = self.scorers.num_gone
        for ticket, assignment in list(self._outstanding.items()):
            if not self.scorers.is_served_by(assignment.replica, assignment.actor_name):
                self._forget(ticket)
                self._lost.append(ticket)

    def take_lost(self) -> list[Ticket]:
        """Return, once, the tickets whose replicas are gone."""
        lost, self._lost = self._lost, []
        return lost

    def abandon(self) -> None:
        """Forget all batches that are being scored."""
        self._outstanding.clear()
        self._lost.clear()
        self.scorers.forget_loads()

    def score_everywhere(self, handles: Sequence[BatchHandle], request: ScoreRequest) -> list[list[BatchHandle]]:
        """Score the same batches on every replica, to compare them; one list per replica, in the batches' order."""
        everywhere = []
        for replica in self.scorers.serving:
            asked = [self._score(replica, handle, request) for handle in handles]
            waiting_for = f"scores from {self.scorers.name(replica)}"
            scored = self.scorers.cluster.get([answer for _, answer in asked], self._timeouts.call_seconds, waiting_for)
            everywhere.append(
                [replace(handle, reference=wire) for handle, (wire, _) in zip(scored, asked, strict=True)]
            )
        return everywhere

    def state(self) -> PoolState:
        """Return who serves, with which model, and how many batches are being scored."""
        state = self.scorers.state(f"teacher-{self.name}", len(self._outstanding))
        return replace(state, model=self.teacher.model, checkpoint=self.checkpoint)

    def late(self) -> str:
        """Name the replicas that owe an answer, or say that none serves."""
        owing = sorted({assignment.replica for assignment in self._outstanding.values()})
        if not owing and not self.serves:
            return f"teacher {self.name}, of which no replica serves"
        return ", ".join(self.scorers.name(replica) for replica in owing)

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        self.scorers.shutdown()

    def _span(self, assignment: _Assignment) -> Span:
        worker, num_rows = self.scorers.name(assignment.replica), len(assignment.handle.trajectory_ids)
        pool, asked_at = f"teacher-{self.name}", assignment.asked_at
        return Span(pool, worker, "score", asked_at, perf_counter(), num_rows, assignment.num_tokens)

    def _forget(self, ticket: Ticket) -> None:
        assignment = self._outstanding.pop(ticket)
        self.scorers.load(assignment.replica, -assignment.num_tokens)

    def _score(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Ticket]:
        """Return references to the scored bytes and to their handle."""
        whose = (self.name,) if self.scorers.is_shared else ()
        score = self.scorers.actor(replica).score.options(num_returns=2)
        wire, answer = score.remote(handle.reference, request, *whose)
        return wire, answer
