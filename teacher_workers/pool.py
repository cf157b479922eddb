"""One teacher's pool: Ray actors with one TeacherWorker each, of which any may die.

Importing this loads neither vLLM nor torch: the driver needs none, and an actor sets their environment first.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from ray.actor import ActorHandle

from cluster import actors
from cluster.actors import PoolTimeouts
from cluster.batch_store import STORE_ENVIRONMENT, add_environment
from cluster.contracts.config import TeacherConfig
from cluster.contracts.errors import ActorDiedError, LostBytesError
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.observation import PoolState, Span
from cluster.replicas import Recipe, Replicas, Supervision
from teacher_workers.actor import TeacherActor

_log = logging.getLogger("preceptor")

Ticket = Any  # ray.ObjectRef of an answer, to wait for and to collect it by


@dataclass(frozen=True)
class _Assignment:
    replica: int
    handle: BatchHandle  # as it was sent
    wire: Any  # reference to the scored batch's bytes
    asked_at: float = field(default_factory=perf_counter)

    @property
    def num_tokens(self) -> int:
        return sum(self.handle.num_tokens)


class TeacherPool:
    """The replicas of one teacher; each batch goes to the one with the fewest tokens still to score.

    A replica that dies is started again; what it owed is lost, and is to be submitted once more.
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
        supervision: Supervision | None = None,
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
            supervision: how often dead ones are started again; None: never.
        """
        self.name = name
        self._timeouts = timeouts
        options = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        recipe = Recipe(actor, lambda actor_name: (actor_name, teacher, max_model_len), options, create)
        self._replicas = Replicas(f"teacher-{name}", recipe, supervision or Supervision())
        self._outstanding: dict[Ticket, _Assignment] = {}
        self._loads: Counter[int] = Counter()  # replica -> tokens still to score
        self._lost: list[Ticket] = []

    def wait_until_ready(self) -> None:
        """Wait for every engine.

        Raises:
            ModelError: vLLM cannot serve the teacher, or its LM head cannot be read.
            ActorError: an actor died or took too long; says which.
        """
        self._replicas.wait_until_ready(self._timeouts.start_seconds, f"teacher {self.name} to start")

    @property
    def serves(self) -> bool:
        """Return whether a replica takes batches."""
        return bool(self._replicas.serving)

    @property
    def size(self) -> int:
        """Return how many replicas take batches, or will when they have started."""
        return self._replicas.size

    @property
    def staying(self) -> list[ActorHandle]:
        """Return the actors that serve, those first that stay when the pool shrinks."""
        return self._replicas.staying

    def resize(self, size: int) -> None:
        """Start replicas, or let some leave when they have scored what they were given; returns at once."""
        self._replicas.resize(size)

    def serving(self) -> dict[int, str]:
        """Return the replicas that take batches, and the names of their actors, which change when they start again."""
        return {replica: self._replicas.actor_name(replica) for replica in self._replicas.serving}

    def ask(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Any]:
        """Let one replica score a batch beside its work; return references to the scored bytes and to their handle."""
        return self._score(replica, handle, request)

    def fence(self, replica: int, reason: str) -> None:
        """End a replica whose scores are wrong, for good; its batches are lost, and to be submitted once more."""
        _log.warning("%s; %s is ended", reason, self._replicas.name(replica))
        self._replicas.retire(replica)
        self._disown(replica)

    def submit(self, handle: BatchHandle, request: ScoreRequest) -> Ticket:
        """Send a batch to the least loaded replica that serves, of at least one; returns at once."""
        serving = self._replicas.serving
        replica = serving[least_loaded([self._loads[index] for index in serving])]
        wire, ticket = self._score(replica, handle, request)
        self._outstanding[ticket] = _Assignment(replica, handle, wire)
        self._loads[replica] += self._outstanding[ticket].num_tokens
        return ticket

    def collect(self, ticket: Ticket) -> BatchHandle | None:
        """Return the scored batch, waiting for it; None when its replica died.

        Raises:
            ScoreError: the replica's scores cannot be training data; names teacher and replica.
            LostBytesError: the batch is gone with the node that held it; the ticket is forgotten.
            ActorError: the replica took too long, or died more often than it may.
        """
        assignment = self._outstanding[ticket]
        waiting_for = f"scores from {self._replicas.name(assignment.replica)}"
        try:
            scored: BatchHandle = actors.get(ticket, self._timeouts.call_seconds, waiting_for)
        except ActorDiedError as error:
            self._replicas.lose(assignment.replica, error)
            self._disown(assignment.replica)
            return None
        except LostBytesError:
            self._forget(ticket)
            raise
        self._forget(ticket)
        sent = assignment.handle
        metrics, spans = {**sent.metrics, **scored.metrics}, (*sent.spans, self._span(assignment))
        return replace(scored, reference=assignment.wire, rollout=sent.rollout, metrics=metrics, spans=spans)

    def look_after(self) -> list[Any]:
        """Replace replicas that died unnoticed, start those whose rest is over, and return what starting ones do.

        Raises:
            ActorError: a replica died more often than it may.
        """
        for replica in self._replicas.look():
            self._disown(replica)
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

    def take_lost(self) -> list[Ticket]:
        """Return, once, the tickets whose replicas are gone."""
        lost, self._lost = self._lost, []
        return lost

    def abandon(self) -> None:
        """Forget all batches that are being scored."""
        self._outstanding.clear()
        self._lost.clear()
        self._loads.clear()

    def score_everywhere(self, handles: Sequence[BatchHandle], request: ScoreRequest) -> list[list[BatchHandle]]:
        """Score the same batches on every replica, to compare them; one list per replica, in the batches' order."""
        everywhere = []
        for replica in self._replicas.serving:
            asked = [self._score(replica, handle, request) for handle in handles]
            waiting_for = f"scores from {self._replicas.name(replica)}"
            scored = actors.get([answer for _, answer in asked], self._timeouts.call_seconds, waiting_for)
            everywhere.append(
                [replace(handle, reference=wire) for handle, (wire, _) in zip(scored, asked, strict=True)]
            )
        return everywhere

    def state(self) -> PoolState:
        """Return who serves, and how many batches are being scored."""
        return self._replicas.state(f"teacher-{self.name}", len(self._outstanding))

    def late(self) -> str:
        """Name the replicas that owe an answer, or say that none serves."""
        owing = sorted({assignment.replica for assignment in self._outstanding.values()})
        if not owing and not self.serves:
            return f"teacher {self.name}, of which no replica serves"
        return ", ".join(self._replicas.name(replica) for replica in owing)

    def shutdown(self) -> None:
        """End engines and actors; no process stays."""
        self._replicas.shutdown()

    def _span(self, assignment: _Assignment) -> Span:
        worker, num_rows = self._replicas.name(assignment.replica), len(assignment.handle.trajectory_ids)
        pool, asked_at = f"teacher-{self.name}", assignment.asked_at
        return Span(pool, worker, "score", asked_at, perf_counter(), num_rows, assignment.num_tokens)

    def _disown(self, replica: int) -> None:
        """Make what a replica owes lost."""
        for ticket in [owed for owed, assignment in self._outstanding.items() if assignment.replica == replica]:
            self._forget(ticket)
            self._lost.append(ticket)

    def _forget(self, ticket: Ticket) -> None:
        assignment = self._outstanding.pop(ticket)
        self._loads[assignment.replica] -= assignment.num_tokens

    def _score(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Ticket]:
        """Return references to the scored bytes and to their handle."""
        wire, answer = self._replicas.actor(replica).score.options(num_returns=2).remote(handle.reference, request)
        return wire, answer


def least_loaded(outstanding_tokens: Sequence[int]) -> int:
    """Return the replica with the fewest tokens still to score; the first of equals.

    Example:
        >>> least_loaded([40, 10, 10])
        1
    """
    return min(range(len(outstanding_tokens)), key=outstanding_tokens.__getitem__)
