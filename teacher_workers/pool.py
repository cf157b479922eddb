"""Sends one teacher's batches to its replicas, of which any may die.

Importing this loads neither vLLM nor torch: the driver needs none, and an actor sets their environment first.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from cluster.actors.cluster import RAY, Cluster, PoolTimeouts
from cluster.actors.object_store import STORE_ENVIRONMENT, add_environment
from cluster.actors.replicas import Pool, Replicas, Supervision
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle, PoolState, Span
from cluster.contracts.errors import ActorDiedError, LostBytesError, PreceptorError, ScoreError
from cluster.contracts.metrics import merge
from cluster.contracts.requests import ScoreRequest

TEACHER_ACTOR = "teacher_workers.actor:TeacherActor"
# Of an actor at once. Batches that wait for the end of a weight update must leave a place for the calls that bring it;
# by default Ray lets 1,000 in.
MAX_CALLS = 1_000_000

Route = Sequence[tuple[str, ScoreRequest]]  # teachers that score a batch, in order, and what is requested of each

_log = logging.getLogger("preceptor")


class TeacherReplicas(Replicas):
    """Counts how many tokens each replica has still to score.

    A replica that dies is started again; pools notice by `num_gone` and by what their answers raise.
    """

    def __init__(
        self,
        label: str,
        actor_class: str,
        teachers: Mapping[str, TeacherConfig],
        arguments: Callable[[str], tuple[Any, ...]],
        options: Sequence[Mapping[str, Any]],
        cluster: Cluster = RAY,
        supervision: Supervision | None = None,
    ) -> None:
        """Begin to start the actors, called LABEL-0, LABEL-1, ...; the arguments are as in Replicas, and:

        Args:
            teachers: that every replica serves, by name: one, or those of a slot.
            options: Ray's actor options, one entry per actor; where the teachers are to have none yet, one for later.
        """
        self.label, self.teachers, self.cluster = label, dict(teachers), cluster
        self.num_gone = 0  # actors that took their batches with them
        self._loads: Counter[int] = Counter()  # replica -> tokens still to score
        stored = [add_environment(option, STORE_ENVIRONMENT) for option in options]
        begins_with = stored if next(iter(teachers.values())).num_workers else []
        super().__init__(label, actor_class, arguments, begins_with, cluster, supervision, spare=stored[0])

    @property
    def is_gone(self) -> bool:
        """Return whether none takes batches, is to come or has anything left to do."""
        return not self.size and not self.leaving

    def least_loaded(self) -> int:
        """Return the replica with the fewest tokens to score, the first of equals, of at least one that serves."""
        return min(self.serving, key=self._loads.__getitem__)

    def load(self, replica: int, num_tokens: int) -> None:
        """Note that a replica has so many more tokens to score; fewer, if negative."""
        self._loads[replica] += num_tokens

    def lose_actor(self, replica: int, actor_name: str, error: PreceptorError) -> None:
        """Replace a dead actor, unless another pool noticed the death before."""
        self.num_gone += 1
        if self.is_served_by(replica, actor_name):
            self.lose(replica, error)

    def quarantine(self, replica: int, reason: str) -> None:
        _log.warning("%s; %s is ended", reason, self.name(replica))
        self.num_gone += 1
        self.retire(replica)

    def maintain(self) -> list[int]:
        """Replace replicas that died unnoticed, start those whose rest is over, and let unloaded ones leave."""
        gone = super().maintain()
        self.num_gone += len(gone)
        for replica in self.leaving:
            if not self._loads[replica]:
                self.retire(replica)
        return gone

    def forget_loads(self) -> None:
        self._loads.clear()

    def end(self) -> None:
        """End actors that have nothing to do, started or not; their engines end with them."""
        self.resize(0)
        for replica in self.leaving:
            self.retire(replica)


@dataclass(frozen=True)
class Hop:
    """Describes one batch at one teacher, and which teachers score it afterwards."""

    handle: BatchHandle  # as it was sent
    request: ScoreRequest
    rest: Route = ()
    replica: int = -1
    actor_name: str = ""
    wire: Any = None  # reference to the scored batch's bytes
    sent_at: float = field(default_factory=perf_counter)

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
    label: str = "",
) -> "TeacherPool":
    """Begin to start a teacher's own replicas, called teacher-NAME-0, ... or LABEL-0, ...; else as in TeacherReplicas.

    `max_model_len` is at least the tokens of the longest trajectory.
    """

    def arguments(actor_name: str) -> tuple[Any, ...]:
        return actor_name, teacher, max_model_len

    if teacher.receives_weights:
        options = [{**option, "max_concurrency": MAX_CALLS} for option in options]
    label = label or f"teacher-{name}"
    replicas = TeacherReplicas(label, TEACHER_ACTOR, {name: teacher}, arguments, options, cluster, supervision)
    return TeacherPool(name, replicas, timeouts)


class TeacherPool(Pool):
    """Holds the batches of one teacher; each goes to the replica with the fewest tokens still to score.

    A replica that dies is started again; the batches that it had are lost, and are to be submitted once more.
    """

    replicas: TeacherReplicas

    def __init__(
        self, name: str, replicas: TeacherReplicas, timeouts: PoolTimeouts, checkpoint: str = "", in_slot: bool = False
    ) -> None:
        """Take the replicas of a teacher.

        `checkpoint` is the backend's identity of the teacher; "": not known yet. Replicas `in_slot` serve other
        teachers too, so that they must be given the name.
        """
        super().__init__(f"teacher {name}", replicas, timeouts)
        self.name = name
        self.checkpoint = checkpoint
        self._more_arguments = (name,) if in_slot else ()
        self.outstanding: dict[Any, Hop] = {}  # which replicas have, by the reference to the scored batch's handle
        self._lost: list[Hop] = []
        self._gone_seen = 0

    @property
    def teacher(self) -> TeacherConfig:
        return self.replicas.teachers[self.name]

    def serving(self) -> dict[int, str]:
        """Return the replicas that take batches, and the names of their actors, which change when they start again."""
        return {replica: self.replicas.actor_name(replica) for replica in self.replicas.serving}

    def ask(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Any]:
        """Let one replica score a batch beside its work; return references to the scored bytes and to their handle."""
        score = self.replicas.actor(replica).score.options(num_returns=2)
        wire, answer = score.remote(handle.reference, request, *self._more_arguments)
        return wire, answer

    def quarantine(self, replica: int, reason: str) -> None:
        """End a replica whose scores are wrong, for good; what it had is scored by another."""
        self.replicas.quarantine(replica, reason)
        self.maintain()

    def submit(self, hop: Hop) -> None:
        """Send a batch to the least loaded replica, of at least one that serves; returns at once."""
        replica = self.replicas.least_loaded()
        wire, answer = self.ask(replica, hop.handle, hop.request)
        actor_name = self.replicas.actor_name(replica)
        sent = replace(hop, replica=replica, actor_name=actor_name, wire=wire, sent_at=perf_counter())
        self.outstanding[answer] = sent
        self.replicas.load(replica, hop.num_tokens)

    def fetch(self, ready: Collection[Any]) -> dict[Any, BatchHandle | PreceptorError]:
        """Return what came, handles or errors, by outstanding references; `ready` may hold other things."""
        came = [answer for answer in ready if answer in self.outstanding]
        answers = self.replicas.cluster.get_each(came, lambda answer: f"scores from {self._replica_of(answer)}")
        return dict(zip(came, answers, strict=True))

    def collect(self, answer: Any, scored: BatchHandle | PreceptorError) -> BatchHandle | None:
        """Return the scored batch of an outstanding reference; None: its replica is gone, and the batch is lost.

        Raises:
            LostBytesError: the batch is gone with the node that held it.
            ScoreError: scores cannot be training data; names teacher and replica.
            ActorError: the replica died more often than it may.
        """
        hop = self.outstanding[answer]
        sent = hop.handle
        if isinstance(scored, ActorDiedError):
            self.replicas.lose_actor(hop.replica, hop.actor_name, scored)
            self.maintain()
            return None
        if isinstance(scored, LostBytesError | ScoreError):
            self._forget(answer)
        if isinstance(scored, PreceptorError):
            raise scored
        self._forget(answer)
        self.replicas.note_progress(hop.replica)
        return replace(
            scored,
            reference=hop.wire,
            rollout=sent.rollout,
            metrics=merge((sent.metrics, scored.metrics)),
            spans=(*sent.spans, self._span(hop)),
            scored_by={**sent.scored_by, **({self.name: self.checkpoint} if self.checkpoint else {})},
            teacher_versions={
                **sent.teacher_versions,
                **({self.name: scored.scorer_version} if self.teacher.source is not None else {}),
            },
        )

    def maintain(self) -> None:
        if self._gone_seen == self.replicas.num_gone:
            return
        self._gone_seen = self.replicas.num_gone
        for answer, hop in list(self.outstanding.items()):
            if not self.replicas.is_served_by(hop.replica, hop.actor_name):
                self._forget(answer)
                self._lost.append(hop)

    def take_lost(self) -> list[Hop]:
        """Return, once, the batches whose replicas are gone."""
        lost, self._lost = self._lost, []
        return lost

    def abandon(self) -> None:
        """Forget all batches, and let weights of an earlier version follow where weights are sent."""
        self.outstanding.clear()
        self._lost.clear()
        self.replicas.forget_loads()
        for replica in self.replicas.serving if self.teacher.receives_weights else ():
            try:
                answer = self.replicas.actor(replica).abandon.remote()
                waiting_for = f"{self.replicas.name(replica)} to abandon its batches"
                self.replicas.cluster.get(answer, self._timeouts.call_seconds, waiting_for)
            except PreceptorError as error:  # it died, or an update of its weights never ended
                self.replicas.lose(replica, error)

    def score_everywhere(self, handles: Sequence[BatchHandle], request: ScoreRequest) -> list[list[BatchHandle]]:
        """Score the same batches on every replica, to compare them; one list per replica, in the batches' order."""
        everywhere = []
        for replica in self.replicas.serving:
            answers = [self.ask(replica, handle, request) for handle in handles]
            waiting_for = f"scores from {self.replicas.name(replica)}"
            seconds = self._timeouts.call_seconds
            scored = self.replicas.cluster.get([answer for _, answer in answers], seconds, waiting_for)
            pairs = zip(scored, answers, strict=True)
            everywhere.append([replace(handle, reference=wire) for handle, (wire, _) in pairs])
        return everywhere

    def state(self) -> PoolState:
        """Return which replicas serve, with which model, and how many batches are being scored."""
        state = self.replicas.state(f"teacher-{self.name}", len(self.outstanding))
        return replace(state, model=self.teacher.model, checkpoint=self.checkpoint)

    def late(self) -> str:
        late = sorted({hop.replica for hop in self.outstanding.values()})
        if not late and not self.replicas.serving:
            return f"teacher {self.name}, of which no replica serves"
        return ", ".join(self.replicas.name(replica) for replica in late)

    def _replica_of(self, answer: Any) -> str:
        return self.replicas.name(self.outstanding[answer].replica)

    def _span(self, hop: Hop) -> Span:
        worker, num_rows = self.replicas.name(hop.replica), len(hop.handle.trajectory_ids)
        return Span(f"teacher-{self.name}", worker, "score", hop.sent_at, perf_counter(), num_rows, hop.num_tokens)

    def _forget(self, answer: Any) -> None:
        hop = self.outstanding.pop(answer)
        self.replicas.load(hop.replica, -hop.num_tokens)
