"""One teacher's pool: its batches at the replicas that score for it, of which any may die.

Importing this loads neither vLLM nor torch: the driver needs none, and an actor sets their environment first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from ray.actor import ActorHandle

from cluster.contracts.errors import ActorDiedError, LostBytesError
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.metrics import merge
from cluster.contracts.observation import PoolState, Span
from cluster.contracts.pools import TeacherConfig
from cluster.workers import actors
from cluster.workers.actors import PoolTimeouts
from cluster.workers.replicas import Supervision
from teacher_workers.scorers import Scorers

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
    actor: type | None = None,
    create: Callable[..., list[ActorHandle]] = actors.create_actors,
    supervision: Supervision | None = None,
) -> "TeacherPool":
    """Begin to start a teacher's own replicas, called teacher-NAME-0, teacher-NAME-1, ...; else as in Scorers."""
    scorers = Scorers(f"teacher-{name}", {name: teacher}, max_model_len, options, actor, create, supervision)
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

    def fence(self, replica: int, reason: str) -> None:
        """End a replica whose scores are wrong, for good; its batches are lost, and to be submitted once more."""
        self.scorers.fence(replica, reason)
        self.look_after()

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
            scored: BatchHandle = actors.get(ticket, self._timeouts.call_seconds, waiting_for)
        except ActorDiedError as error:
            self.scorers.lose(assignment.replica, assignment.actor_name, error)
            self.look_after()
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

    def look_after(self) -> None:
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
            scored = actors.get([answer for _, answer in asked], self._timeouts.call_seconds, waiting_for)
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
