"""Finds out, before any training, whether student, teachers and engines agree on what a token is worth.

`check_tokenizers` reads files only and runs before every start. The others ask live engines; `preceptor check` runs
them and prints what they found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.config.stages import Dtype
from cluster.contracts.errors import SelfCheckError
from cluster.contracts.trajectory import Floats, ragged
from teacher_workers.audit.checks import AGREEMENT_NATS

SELF_KL_NATS: Mapping[Dtype, float] = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-2}
OPTIMUM_GRADIENT_NORM: Mapping[Dtype, float] = {"float32": 1e-5, "bfloat16": 5e-1, "float16": 1e-1}
UNIFORM_NATS = 1e-3  # spread below which scores say nothing about their tokens


@dataclass(frozen=True)
class CheckResult:
    """One check's finding."""

    name: str
    found: str
    passed: bool
    advice: str  # what to do when it did not pass


def require(results: Sequence[CheckResult]) -> None:
    """Raise on the first failed check.

    Raises:
        SelfCheckError: says what was found and what to do.
    """
    for result in results:
        if not result.passed:
            raise SelfCheckError(f"self-check '{result.name}': found {result.found}; {result.advice}")


def check_replicas(name: str, replicas: Sequence[pa.RecordBatch], dtype: Dtype) -> CheckResult:
    """Compare the scores that each replica of one teacher gave to the same trajectories."""
    first = ragged(replicas[0], "teacher_logprobs").values
    gap = max(
        (float(np.abs(ragged(other, "teacher_logprobs").values - first).mean()) for other in replicas[1:]), default=0.0
    )
    return CheckResult(
        f"teacher {name}: replicas agree",
        f"{gap:.2e} nats between {len(replicas)} replica(s)",
        gap <= AGREEMENT_NATS[dtype],
        "a replica serves another checkpoint or precision; restart the pool",
    )


def check_not_uniform(name: str, scored: pa.RecordBatch) -> CheckResult:
    """Look for a teacher that gives every token the same probability, as one with unloaded weights does."""
    spread = float(ragged(scored, "teacher_logprobs").values.std())
    return CheckResult(
        f"teacher {name}: scores are not uniform",
        f"standard deviation {spread:.3f} nats",
        spread > UNIFORM_NATS,
        "its weights were not loaded; check the model directory",
    )


def check_sampler_gap(generated: pa.RecordBatch, student_logprobs: Floats, dtype: Dtype) -> CheckResult:
    """Compare the log-probabilities that the rollout engine reported with the learner's own forward pass."""
    gap = float(np.abs(ragged(generated, "rollout_logprobs").values - student_logprobs).mean())
    return CheckResult(
        "rollout engine and learner agree",
        f"{gap:.2e} nats per token",
        gap <= AGREEMENT_NATS[dtype],
        "compare rollout.engine.dtype and learner.dtype, and that rollout.temperature, top_p and top_k are 1, 1 and 0",
    )


def check_self_kl(scored_by_itself: pa.RecordBatch, dtype: Dtype) -> CheckResult:
    """Measure KL(student || student) through the whole pipeline; a shift of one token shows as several nats."""
    written = ragged(scored_by_itself, "rollout_logprobs").values
    log_ratio = written - ragged(scored_by_itself, "teacher_logprobs").values
    kl, spread = float(log_ratio.mean()), float(np.abs(log_ratio).mean())
    return CheckResult(
        "student scored as its own teacher",
        f"KL {kl:.2e} and mean absolute log-ratio {spread:.2e} nats per token",
        abs(kl) <= SELF_KL_NATS[dtype] and spread <= AGREEMENT_NATS[dtype],
        "generation and scoring disagree on alignment, chat template or temperature",
    )


def check_gradient_at_optimum(term: str, gradient_norm: float, dtype: Dtype) -> CheckResult:
    """Look at the gradient where student and teacher are the same model; anything but 0 would drive them apart."""
    return CheckResult(
        f"term '{term}' at student = teacher",
        f"gradient norm {gradient_norm:.2e}",
        gradient_norm <= OPTIMUM_GRADIENT_NORM[dtype],
        "the learner and the scoring engine compute different probabilities; compare their dtypes",
    )
