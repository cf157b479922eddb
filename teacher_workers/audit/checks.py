"""Finds out whether a replica's answers can be a teacher's: by themselves where possible, else by comparison.

`audit_answers` reads what each replica of one teacher answered to the same probes; `probes.py` says what those are and
why their perturbed rows show a shift by one. Of each answer alone: is it there for every token, finite, not constant,
does it change where a replaced token must change it and nowhere before, and do its columns agree with each other? Then
the answers that pass are compared: with the reference, the run's first answers to the same probes, where there is one;
otherwise with each other, and the minority is named.

Answers of the same weights differ a little with the batch that they were computed in, in bfloat16 by single bits of the
logits. Every difference here is therefore measured in tolerances, and averaged over tokens and rows before it counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.config.stages import Dtype
from cluster.config.terms import TEACHER
from cluster.contracts.errors import NotFiniteError, ScoreError, UniformError, WrongLengthError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.signals import SIGNALS, Signal, find_signal, is_finite
from cluster.contracts.trajectory import ragged
from teacher_workers.audit.probes import Probes

# Mean absolute difference, in nats, that two implementations of the same model may show: vLLM and transformers in bf16
# differ by 0.05 on a 99M-parameter student whose text is still poor; a shift by one token shows as several nats.
AGREEMENT_NATS: Mapping[Dtype, float] = {"float32": 1e-3, "bfloat16": 1e-1, "float16": 2e-2}
HIDDEN_PER_NAT = 2.0  # a hidden state's tolerance: in bfloat16, two tenths of its length
MAX_HIDDEN = 0.3  # unrelated states after the same norm are at least as far apart
FLOOR_NATS = -20.0  # below it, scores of one model in two batches differ most, and training least


@dataclass(frozen=True)
class Tolerance:
    """Bounds how much two answers of the same weights may differ, as a mean over tokens."""

    nats: float
    hidden: float  # of a hidden state: length of the difference / length


def hidden_tolerance(nats: float) -> float:
    """Return how far apart two implementations of a model may have its hidden states, over their length."""
    return min(MAX_HIDDEN, HIDDEN_PER_NAT * nats)


@dataclass(frozen=True)
class Answer:
    """Holds both batches of the probes as one replica scored them."""

    rows: pa.RecordBatch
    perturbed: pa.RecordBatch


def columns_of(request: ScoreRequest) -> list[str]:
    return [find_signal(name).column(request.model) for name in sorted(request.signals)]


def differences(first: pa.RecordBatch, second: pa.RecordBatch, tolerance: Tolerance) -> tuple[NDArray[Any], ...]:
    """Return by how many tolerances two answers to rows of the same lengths differ, per scored token of all rows.

    Returns:
        Of the sampled tokens' scores, and of the other signals of their positions (columns that only one answer has
        are left out): two arrays [scored_tokens].
    """
    shared = set(first.schema.names) & set(second.schema.names)
    of_tokens, of_positions = (
        [
            _difference(first, second, signal, tolerance)
            for signal in SIGNALS.values()
            if signal.audited == reads and signal.column(TEACHER) in shared
        ]
        for reads in ("token", "position")
    )
    return np.max(of_tokens, axis=0), np.max([np.zeros(len(of_tokens[0])), *of_positions], axis=0)


def gap(first: Answer, second: Answer, tolerance: Tolerance) -> float:
    """Return the mean difference between two answers to the same probes in tolerances: above 1, they disagree."""
    pairs = [differences(first.rows, second.rows, tolerance), differences(first.perturbed, second.perturbed, tolerance)]
    return max(float(np.concatenate(column).mean()) for column in zip(*pairs, strict=True))


def column(batch: pa.RecordBatch, name: str) -> NDArray[Any]:
    """Return the teacher's column in float32; uint16 stands for bfloat16's bits, float32's upper half."""
    values = ragged(batch, f"{TEACHER}_{name}").values
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _difference(first: pa.RecordBatch, second: pa.RecordBatch, signal: Signal, tolerance: Tolerance) -> NDArray[Any]:
    """Return [tokens]: the difference of a column in tolerances, averaged over candidates."""
    left, right = (column(answer, signal.name) for answer in (first, second))
    if signal.width == "model":
        lengths = np.maximum(np.linalg.norm(left, axis=-1), 1e-9)
        relative: NDArray[Any] = np.linalg.norm(left - right, axis=-1) / lengths / tolerance.hidden
        return relative
    nats: NDArray[Any] = np.abs(np.maximum(left, FLOOR_NATS) - np.maximum(right, FLOOR_NATS)) / tolerance.nats
    return nats if nats.ndim == 1 else nats.mean(axis=1)


Kind = Literal[
    "refused",  # the teacher's worker or engine raised an error of another kind than those below
    "wrong_length",  # a column is missing or does not have one value per completion token
    "not_finite",
    "uniform",  # every token got the same score
    "misaligned",  # scores change with a token that they do not depend on, or not with one that they do
    "contradictory",  # columns of one answer exclude each other
    "disagreeing",  # other replicas of the teacher answered otherwise
    "replaced",  # no replica answers as the teacher of this name did at first
]
ERROR_KINDS: Mapping[type[ScoreError], Kind] = {
    WrongLengthError: "wrong_length",
    NotFiniteError: "not_finite",
    UniformError: "uniform",
}
Deviation = tuple[Kind, str]  # and the sentence's end, which follows the replica's name

UNIFORM_NATS = 1e-3  # spread below which scores say nothing about their tokens
SHIFTED = "they belong to other positions than they stand at"
# In tolerances, as means over the rows; and no more than the noise, the mean change of all positions before, explains.
EARLY = 2.0  # a replaced token may change the position just before so much
LATE = 0.1  # and must change what comes next by more than this
NOISE = 4.0


@dataclass(frozen=True)
class Fault:
    """Describes one replica whose scores cannot be training data."""

    teacher: str
    replica: str
    kind: Kind
    sentence: str  # names teacher and replica


@dataclass(frozen=True)
class AuditResult:
    """Holds the faults of one teacher's replicas, and an answer that can be trusted."""

    faults: tuple[Fault, ...]
    trusted: Answer | None  # of a replica without finding


def audit_answers(
    teacher: str,
    probes: Probes,
    answers: Mapping[str, Answer | ScoreError],
    reference: Answer | None,
    tolerance: Tolerance,
    request: ScoreRequest,
) -> AuditResult:
    """Check what the replicas of one teacher, by name, answered to a request for the probes' scores, or raised instead.

    `reference` is the teacher's answer to the same probes when the run began, if that is known.
    """
    faults: dict[str, Deviation] = {}
    sound: dict[str, Answer] = {}
    for replica, answer in answers.items():
        fault = find_fault(probes, answer, tolerance, request)
        if fault is not None:
            kind, rest = fault
            faults[replica] = (kind, rest.removeprefix(f"{replica}: "))  # a worker's errors begin with it
        elif isinstance(answer, Answer):
            sound[replica] = answer
    faults |= _among_replicas(sound, tolerance) if reference is None else _against(reference, sound, tolerance)
    return AuditResult(
        tuple(
            Fault(teacher, replica, kind, f"teacher {teacher}, replica {replica}: {rest}")
            for replica, (kind, rest) in faults.items()
        ),
        next((answer for replica, answer in sound.items() if replica not in faults), None),
    )


def find_fault(
    probes: Probes, answer: Answer | ScoreError, tolerance: Tolerance, request: ScoreRequest
) -> Deviation | None:
    """Return what is wrong with one answer by itself, if anything is."""
    if isinstance(answer, ScoreError):
        return ERROR_KINDS.get(type(answer), "refused"), str(answer)
    return (
        _wrong_length(probes.rows, answer.rows, request)
        or _wrong_length(probes.perturbed, answer.perturbed, request)
        or _not_finite(answer, request)
        or _uniform(answer)
        or _misaligned(probes, answer, tolerance)
        or _contradictory(answer.rows, tolerance, request)
    )


def _wrong_length(probe: pa.RecordBatch, answer: pa.RecordBatch, request: ScoreRequest) -> Deviation | None:
    if answer.num_rows != probe.num_rows or not np.array_equal(
        ragged(answer, "token_ids").values, ragged(probe, "token_ids").values
    ):
        return "wrong_length", f"it answered for other rows than it was asked about ({probe.num_rows})"
    expected = ragged(probe, "rollout_logprobs").lengths
    for name in columns_of(request):
        if name not in answer.schema.names:
            return "wrong_length", f"its answer lacks the column {name}"
        lengths = ragged(answer, name).lengths
        if not np.array_equal(lengths, expected):
            row = int(np.argmax(lengths != expected))
            return "wrong_length", f"{name} has {lengths[row]} values for {expected[row]} tokens"
    return None


def _not_finite(answer: Answer, request: ScoreRequest) -> Deviation | None:
    for batch in (answer.rows, answer.perturbed):
        for name in columns_of(request):
            finite = is_finite(ragged(batch, name).values)
            if not finite.all():
                return "not_finite", f"{finite.size - np.count_nonzero(finite)} values of {name} are NaN or infinite"
    return None


def _uniform(answer: Answer) -> Deviation | None:
    scores = np.concatenate([column(answer.rows, "logprobs"), column(answer.perturbed, "logprobs")])
    if scores.std() > UNIFORM_NATS:
        return None
    return "uniform", f"all {len(scores)} tokens were scored {scores.mean():.4f}, so the scores say nothing about them"


def _misaligned(probes: Probes, answer: Answer, tolerance: Tolerance) -> Deviation | None:
    """Look for the first position that a replaced token changes; `probes.py` says where it must be."""
    token, position = differences(answer.rows, answer.perturbed, tolerance)
    offsets = ragged(probes.rows, "rollout_logprobs").offsets
    replaced = offsets[:-1] + np.array(probes.replaced)
    # A token's own score depends on it; what is known of a position without its token does so from the next one on.
    for changes, first, what in ((token, replaced, "scores"), (position, replaced + 1, "distributions")):
        earlier = changes[np.arange(len(changes)) < np.repeat(first, np.diff(offsets))]
        allowed = NOISE * earlier.mean()
        if earlier.mean() > 1 or changes[first - 1].mean() > max(EARLY, allowed):
            return "misaligned", f"its {what} change before the token that was replaced in its rows; {SHIFTED}"
        if np.maximum(token, position)[first].mean() <= max(LATE, allowed):
            return "misaligned", f"its {what} do not change where a token was replaced in its rows; {SHIFTED}"
    return None


def _contradictory(batch: pa.RecordBatch, tolerance: Tolerance, request: ScoreRequest) -> Deviation | None:
    """Look for columns that no one distribution per position can have."""
    known = sampled = column(batch, "logprobs")[:, None]  # [tokens, n] scores of different tokens
    again = sampled
    if request.top_k:
        known = column(batch, "candidate_logprobs")
        again = _among_most_likely(batch, sampled, known)
    elif request.given_candidates:
        again = column(batch, "candidate_logprobs")[:, :1]  # the sampled token
    if np.abs(sampled - again).mean() > tolerance.nats:
        return "contradictory", "it scored the written tokens otherwise than the same tokens among the candidates"
    if (np.diff(known, axis=1) > tolerance.nats).any():
        return "contradictory", "its most likely tokens do not come in the order of their scores"
    probabilities = np.exp(known.astype(np.float64))
    total = probabilities.sum(axis=1).mean()
    if total > 1 + tolerance.nats:
        return "contradictory", f"the probabilities of a position's tokens add up to {total:.3f}"
    least_entropy = -(probabilities * known).sum(axis=1)
    if request.entropy and np.maximum(least_entropy - column(batch, "entropy"), 0).mean() > tolerance.nats:
        return "contradictory", "its entropies are lower than the scores of single tokens allow"
    return None


def _among_most_likely(batch: pa.RecordBatch, sampled: NDArray[Any], known: NDArray[Any]) -> NDArray[Any]:
    """Return [tokens, 1]: what the sampled token's score must be, given the most likely tokens and theirs."""
    sampled_ids = ragged(batch, "token_ids").values[ragged(batch, "loss_mask").values != 0]
    is_sampled = ragged(batch, "candidate_ids").values == sampled_ids[:, None]
    score = np.where(is_sampled, known, -np.inf).max(axis=1, keepdims=True)
    # A token that is not among them is no more likely than the last of them.
    return np.where(is_sampled.any(axis=1, keepdims=True), score, np.minimum(sampled, known[:, -1:]))


def _against(reference: Answer, sound: Mapping[str, Answer], tolerance: Tolerance) -> dict[str, Deviation]:
    gaps = {replica: gap(reference, answer, tolerance) for replica, answer in sound.items()}
    others = ", ".join(replica for replica, distance in gaps.items() if distance <= 1)
    kind: Kind = "disagreeing" if others else "replaced"
    agreeing = f"{others} still answers as then" if others else "it is not the teacher that the run began with"
    return {
        replica: (
            kind,
            f"its answers to the run's probes are {distance:.1f} times as far from those at the beginning of the run "
            f"as the dtype explains; {agreeing}",
        )
        for replica, distance in gaps.items()
        if distance > 1
    }


def _among_replicas(sound: Mapping[str, Answer], tolerance: Tolerance) -> dict[str, Deviation]:
    """Name the replicas that the majority does not agree with, or all when there is none."""
    peers = {
        replica: [other for other in sound if gap(answer, sound[other], tolerance) <= 1]
        for replica, answer in sound.items()
    }
    largest = max(peers.values(), key=len, default=[])
    if len(largest) == len(sound):
        return {}
    if 2 * len(largest) > len(sound):
        rest = f"its scores are not those of {', '.join(largest)} for the same rows"
        return {replica: ("disagreeing", rest) for replica in sound if replica not in largest}
    rest = f"{', '.join(sound)} score the same rows differently, and which of them is right cannot be told"
    return dict.fromkeys(sound, ("disagreeing", rest))
