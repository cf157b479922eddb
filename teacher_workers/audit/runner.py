"""Lets every replica of every teacher score a few rows of the run, beside its work, and quarantines faulty ones.

Audits run at the start, every N steps, and when a replica was started again. `checks.py` finds the faults; this file
sends the probes, collects the answers as they come and keeps each teacher's first ones. Only `finish` waits: the driver
waits for `outstanding` beside the pools' references and calls `collect` with those that are ready.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from cluster.actors.cluster import RAY
from cluster.actors.object_store import pack
from cluster.config.run_config import Config
from cluster.config.stages import TeacherConfig
from cluster.config.terms import TEACHER
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ActorError, ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Ints, version_field
from cluster.contracts.wire import from_wire
from cluster.models.alignment import load_token_map
from teacher_workers.audit.checks import AGREEMENT_NATS, Answer, Fault, Tolerance, audit_answers, hidden_tolerance
from teacher_workers.audit.probes import MIN_SCORED_TOKENS, MIN_TOKENS, Probes, choose_rows, make_probes
from teacher_workers.audit.reference import Origin, Reference, load_reference, save_reference
from teacher_workers.backends.base import find_backend

if TYPE_CHECKING:
    from teacher_workers.pool import TeacherPool

_log = logging.getLogger("preceptor")


@dataclass
class AuditedTeacher:
    """Holds one teacher, and what earlier audits kept of it."""

    name: str
    teacher: TeacherConfig
    pool: "TeacherPool"
    request: ScoreRequest
    tolerance: Tolerance
    origin: Origin
    path: Path
    rows: list[Ints] = field(default_factory=list)
    reference: Reference | None = None
    audited: set[str] = field(default_factory=set)  # replicas that were audited at least once


def audited_teacher(config: Config, name: str, pool: "TeacherPool", folder: Path) -> AuditedTeacher:
    """Describe a teacher of the run, with what earlier parts of the run kept of it."""
    teacher, request = config.teachers[name], audit_request(config, name)
    engine = teacher.engine
    # Quantised layers round what they multiply, so they are no more exact than the coarsest dtype.
    nats = config.score_audit.tolerance_nats or AGREEMENT_NATS["bfloat16" if engine.quantization else engine.dtype]
    tolerance = Tolerance(nats, hidden_tolerance(nats))
    identity = find_backend(teacher).identity(teacher)
    origin = Origin(teacher.model, engine.dtype, engine.quantization, identity, request, teacher.backend)
    subject = AuditedTeacher(name, teacher, pool, request, tolerance, origin, folder / f"{name}.arrow")
    if teacher.is_refreshed:
        _log.warning(
            "teacher %s follows the student; audits compare its replicas, and not with its first answers", name
        )
        return subject
    kept = load_reference(subject.path)
    if kept is not None:
        subject.rows = kept.rows
        if kept.origin.is_same_teacher(origin):
            subject.reference = kept
        else:
            was = f"{kept.origin.model} in {kept.origin.dtype}"
            _log.warning("teacher %s was %s; its scores are held against new ones from now on", name, was)
    return subject


def in_tokens_of(teacher: TeacherConfig, rows: list[Ints]) -> list[Ints]:
    """Return rows of the student in the teacher's tokens; those that its tokenizer would change are left out."""
    if not teacher.is_aligned:
        return rows
    token_map = load_token_map(teacher)
    written = [token_map.rewrite(tokens) for tokens in rows]
    return [tokens for tokens in written if tokens is not None and len(tokens) >= MIN_TOKENS]


def audit_request(config: Config, name: str) -> ScoreRequest:
    """Return what an audit requests of a teacher: all that the run does in any role, and the entropy if there is."""
    requests = [request for route in config.routes for teacher, request in config.scorers(route) if teacher == name]
    top_k = max((request.top_k for request in requests), default=0)
    return ScoreRequest(
        TEACHER,
        top_k=top_k,
        given_candidates=not top_k and any(request.given_candidates for request in requests),
        entropy="entropy" in find_backend(config.teachers[name]).signals,
        hidden=any(request.hidden for request in requests),
        layers=any(request.layers for request in requests),
        further=config.teachers[name].signals,
    )


FETCH_SECONDS = 60.0  # for an answer that is there and is small


@dataclass
class _Audit:
    """Holds one teacher's audit that is under way."""

    subject: AuditedTeacher
    probes: Probes
    deadline: float
    waiting: dict[Any, "_Part"] = field(default_factory=dict)  # by the reference to its handle
    batches: dict[str, dict[str, pa.RecordBatch]] = field(default_factory=dict)  # of each replica: "rows", "perturbed"
    errors: dict[str, ScoreError] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """Names half of the probes of one replica."""

    replica: str
    half: str
    wire: Any  # reference to the scored bytes


class ScoreAudit:
    """Runs the audits of one run."""

    def __init__(
        self,
        config: Config,
        pools: Mapping[str, "TeacherPool"],
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Read what earlier parts of the run kept in `folder`; `pools` has every teacher's, by name."""
        self._settings = config.score_audit
        self._timeout_seconds = config.ray.call_timeout_seconds
        self._clock = clock
        self._folder = folder
        audited = pools if config.score_audit.rows else {}
        self._subjects = [audited_teacher(config, name, pool, folder) for name, pool in audited.items()]
        self._under_way: list[_Audit] = []
        self._begun_at: int | None = None  # step of the last audit of all replicas; None: none yet

    def for_replacement(self, config: Config, pools: Mapping[str, "TeacherPool"]) -> "ScoreAudit":
        """Return audits of pools that are to follow others, by the same rows; a new checkpoint has no reference yet.

        `config` names the models that the new pools serve.
        """
        audit = ScoreAudit(config, pools, self._folder, self._clock)
        current = {subject.name: subject for subject in self._subjects}
        for subject in audit._subjects:
            subject.rows = current[subject.name].rows
            if subject.origin != current[subject.name].origin:
                subject.reference = None
        return audit

    def adopt(self, for_replacement: "ScoreAudit") -> None:
        """Let the audits of pools that have followed others stand for the others'."""
        new = {subject.name: subject for subject in for_replacement._subjects}
        self._under_way = [audit for audit in self._under_way if audit.subject.name not in new]
        self._subjects = [new.get(subject.name, subject) for subject in self._subjects]
        for subject in new.values():
            if subject.reference is None:  # the kept one is of another checkpoint
                subject.path.unlink(missing_ok=True)

    @property
    def needs_rows(self) -> bool:
        """Return whether a teacher has no rows for its probes yet; a resumed run has kept them."""
        return any(not subject.rows for subject in self._subjects)

    def take_rows(self, handles: Sequence[BatchHandle]) -> None:
        """Choose the rows of the run's audits among generated or scored batches, which it fetches."""
        shortest = sorted(handles, key=_shortest_row)[: self._settings.rows]
        references, waiting_for = [handle.reference for handle in shortest], "rows for the audit of scores"
        wires = [RAY.get(reference, self._timeout_seconds, waiting_for) for reference in references]
        rows = choose_rows([from_wire(wire) for wire in wires], self._settings.rows)
        if not rows:
            _log.warning("score_audit: no row is long enough to audit teachers with; their scores are not audited")
        for subject in self._subjects:
            subject.rows = subject.rows or in_tokens_of(subject.teacher, rows)

    def is_due(self, step: int) -> bool:
        """Tell whether, after this many steps, a replica is to be audited; never while an audit is under way."""
        return not self._under_way and any(self._due_replicas(subject, step) for subject in self._subjects)

    def begin(self, step: int) -> None:
        """Send probes to the replicas that are due after this many steps; returns at once."""
        for subject in self._subjects:
            replicas = self._due_replicas(subject, step)
            if replicas:
                self._under_way.append(_ask(subject, replicas, self._clock() + self._timeout_seconds))
                subject.audited.update(replicas.values())
        if self._is_due_for_all(step) and self._under_way:
            self._begun_at = step

    @property
    def outstanding(self) -> list[Any]:
        """Return references that are ready when a replica has answered."""
        return [reference for audit in self._under_way for reference in audit.waiting]

    def collect(self, ready: Iterable[Any]) -> list[Fault]:
        """Take the answers that are there; check those of a teacher when they are complete or late.

        `ready` may hold other things than what is `outstanding` here. Each replica at fault is quarantined already.

        Raises:
            ScoreError: no replica of a teacher is left that could be trusted.
        """
        there, faults = set(ready), []
        for audit in list(self._under_way):
            for reference in there.intersection(audit.waiting):
                _collect(audit, reference)
            if not audit.waiting or self._clock() > audit.deadline:
                self._under_way.remove(audit)
                faults += _conclude(audit)
        return faults

    def finish(self) -> list[Fault]:
        """Wait for all answers, as at the start, before anything is learned from scores, and `collect` them."""
        faults = []
        while self._under_way:
            waiting = self.outstanding
            patience = max(0.0, max(audit.deadline for audit in self._under_way) - self._clock())
            ready = ray.wait(waiting, num_returns=len(waiting), timeout=patience)[0] if waiting else []
            faults += self.collect(ready)
        return faults

    def _due_replicas(self, subject: AuditedTeacher, step: int) -> dict[int, str]:
        if not subject.rows:
            return {}
        all_due = self._is_due_for_all(step)
        serving = subject.pool.serving()
        return {replica: name for replica, name in serving.items() if all_due or name not in subject.audited}

    def _is_due_for_all(self, step: int) -> bool:
        """Tell whether a multiple of `every_steps` was passed since all replicas were audited."""
        every_steps, begun_at = self._settings.every_steps, self._begun_at
        return begun_at is None or (every_steps > 0 and step // every_steps > begun_at // every_steps)


def _shortest_row(handle: BatchHandle) -> float:
    """Return the tokens of the batch's shortest row that says enough."""
    return min((tokens for tokens in handle.num_tokens if tokens > MIN_SCORED_TOKENS), default=math.inf)


def _ask(subject: AuditedTeacher, replicas: Mapping[int, str], deadline: float) -> _Audit:
    audit = _Audit(subject, make_probes(subject.rows, subject.request, subject.teacher.stop_class), deadline)
    for half, batch in (("rows", audit.probes.rows), ("perturbed", audit.probes.perturbed)):
        wire, handle = pack(batch, {})
        handle = replace(handle, reference=wire)  # the bytes themselves: a few kilobytes that Ray sends with the call
        for replica, name in replicas.items():
            scored, answer = subject.pool.ask(replica, handle, subject.request)
            audit.waiting[answer] = _Part(name, half, scored)
    return audit


def _collect(audit: _Audit, reference: Any) -> None:
    part = audit.waiting.pop(reference, None)
    if part is None:  # its replica died
        return
    waiting_for = f"audited scores from {part.replica}"
    try:
        RAY.get(reference, FETCH_SECONDS, waiting_for)
        batch = from_wire(RAY.get(part.wire, FETCH_SECONDS, waiting_for), "scored")
        audit.batches.setdefault(part.replica, {})[part.half] = batch
    except ScoreError as error:
        audit.errors[part.replica] = error
    except ActorError as error:  # the pool finds that out by itself, and what it starts instead is audited
        _log.warning("score_audit: %s", error)
        audit.waiting = {key: other for key, other in audit.waiting.items() if other.replica != part.replica}


def _conclude(audit: _Audit) -> list[Fault]:
    """Check the answers, keep the first ones that can be trusted, and quarantine faulty replicas."""
    subject = audit.subject
    if audit.waiting:
        late = ", ".join(sorted({part.replica for part in audit.waiting.values()}))
        _log.warning("score_audit: no answer from %s in time; they are not checked", late)
    kept = subject.reference
    reference = None if kept is None else kept.for_request(subject.request)
    whole = {replica: Answer(**halves) for replica, halves in audit.batches.items() if len(halves) == 2}
    answers: dict[str, Answer | ScoreError] = {**_of_newest_version(whole), **audit.errors}
    result = audit_answers(subject.name, audit.probes, answers, reference, subject.tolerance, subject.request)
    if kept is None and result.trusted is not None and not subject.teacher.is_refreshed:
        subject.reference = Reference(subject.origin, result.trusted)
        save_reference(subject.path, subject.reference)
    faults = [_with_advice(subject, fault) for fault in result.faults]
    _quarantine(subject, faults)
    return faults


def _of_newest_version(answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Leave out answers that are of older weights, in whole or in part: the teacher took new ones meanwhile."""
    column = version_field(TEACHER).name
    versions = {
        replica: {version for batch in (answer.rows, answer.perturbed) for version in batch[column].to_pylist()}
        for replica, answer in answers.items()
    }
    newest = max((version for of_replica in versions.values() for version in of_replica), default=0)
    return {replica: answer for replica, answer in answers.items() if versions[replica] == {newest}}


def _with_advice(subject: AuditedTeacher, fault: Fault) -> Fault:
    if fault.kind != "replaced" or subject.reference is None:
        return fault
    model = subject.origin.model
    changed = find_backend(subject.teacher).identity(subject.teacher) != subject.reference.origin.fingerprint
    files = f"the files of {model} {'are others' if changed else 'are the same'} now"
    advice = f"{files}; bring the old teacher back, or delete {subject.path} to go on with this one"
    return replace(fault, sentence=f"{fault.sentence}; {advice}")


def _quarantine(subject: AuditedTeacher, faults: Sequence[Fault]) -> None:
    serving = subject.pool.serving()
    wrong = {fault.replica: fault.sentence for fault in faults}
    if wrong and set(wrong) >= set(serving.values()):
        raise ScoreError(f"{faults[0].sentence}; no other replica of teacher {subject.name} can be trusted")
    for replica, name in serving.items():
        if name in wrong:
            subject.pool.quarantine(replica, wrong[name])
