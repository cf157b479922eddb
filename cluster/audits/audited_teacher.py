"""One teacher as its audits see it: its pool, what it is asked, how exact it is, and what it said at first."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cluster.audits.self_checks import AGREEMENT_NATS
from cluster.contracts.config import Config
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.objective import TEACHER
from cluster.contracts.trajectory import Ints
from teacher_workers.answers import Tolerance
from teacher_workers.reference import Origin, Reference, fingerprint, load_reference

HIDDEN_PER_NAT = 2.0  # a hidden state's tolerance: in bfloat16, two tenths of its length
MAX_HIDDEN = 0.3  # unrelated states after the same norm are at least as far apart

_log = logging.getLogger("preceptor")


class AuditedPool(Protocol):
    """What an audit needs of one teacher's pool."""

    def serving(self) -> Mapping[int, str]:
        """Return the replicas that serve now, and their names; one that was started again has another name."""

    def ask(self, replica: int, handle: BatchHandle, request: ScoreRequest) -> tuple[Any, Any]:
        """Let one replica score a batch, and return references to the scored bytes and to their handle.

        The handle's `reference` is the batch's wire bytes themselves: a few kilobytes that Ray sends with the call.
        """

    def fence(self, replica: int, reason: str) -> None:
        """Give this replica no more batches, and send those that it has elsewhere."""


@dataclass
class AuditedTeacher:
    """One teacher, and what is known of it."""

    name: str
    pool: AuditedPool
    request: ScoreRequest
    tolerance: Tolerance
    origin: Origin
    path: Path
    rows: list[Ints] = field(default_factory=list)
    reference: Reference | None = None
    audited: set[str] = field(default_factory=set)  # replicas that have been asked at least once


def audited_teacher(config: Config, name: str, pool: AuditedPool, folder: Path) -> AuditedTeacher:
    """Describe a teacher of the run, with what earlier parts of the run kept of it.

    Raises:
        CheckpointError: its reference cannot be read.
        ModelError: its files cannot be found.
    """
    teacher, request = config.teachers[name], audit_request(config, name)
    engine = teacher.engine
    # Quantised layers round what they multiply, so they are no more exact than the coarsest dtype.
    nats = config.score_audit.tolerance_nats or AGREEMENT_NATS["bfloat16" if engine.quantization else engine.dtype]
    tolerance = Tolerance(nats, min(MAX_HIDDEN, HIDDEN_PER_NAT * nats))
    origin = Origin(teacher.model, engine.dtype, engine.quantization, fingerprint(teacher.model), request)
    subject = AuditedTeacher(name, pool, request, tolerance, origin, folder / f"{name}.arrow")
    kept = load_reference(subject.path)
    if kept is not None:
        subject.rows = kept.rows
        if kept.origin.is_same_teacher(origin):
            subject.reference = kept
        else:
            was = f"{kept.origin.model} in {kept.origin.dtype}"
            _log.warning("teacher %s was %s; its scores are held against new ones from now on", name, was)
    return subject


def audit_request(config: Config, name: str) -> ScoreRequest:
    """Return what an audit asks of a teacher: all that the run asks of it in any role, and always the entropy."""
    asked = [request for route in config.routes for teacher, request in config.scorers(route) if teacher == name]
    top_k = max((request.top_k for request in asked), default=0)
    return ScoreRequest(
        TEACHER,
        top_k=top_k,
        given_candidates=not top_k and any(request.given_candidates for request in asked),
        entropy=True,
        hidden=any(request.hidden for request in asked),
    )
