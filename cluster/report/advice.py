"""Finds, in a run's steps, the traps that other runs fell into, and says what to do about each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.report.run_data import RunData

FIRST_STEPS = 5  # whose mean is where a run began
MIN_STEPS = 10  # before which nothing is said of trends


@dataclass(frozen=True)
class Advice:
    """Says what was noticed in a run, and what may help."""

    noticed: str
    advice: str


def advise(run: RunData) -> list[Advice]:
    """Return all that applies to the run, the traps of the README first."""
    applying = [check(run) for check in CHECKS]
    return [advice for advice in applying if advice is not None]


def _first(values: Sequence[float]) -> float:
    return fmean(values[:FIRST_STEPS])


def _last(values: Sequence[float]) -> float:
    return fmean(values[-FIRST_STEPS:])


def _strangers(run: RunData) -> Advice | None:
    kl = run.metric("train/kl")
    if not kl or _first(kl) < 4:
        return None
    return Advice(
        f"The KL began at {_first(kl):.1f} nats per token: the teacher finds the student's text very unlikely.",
        "Compare the chat templates: `preceptor check` says what differs between the two.",
    )


def _grows(run: RunData) -> Advice | None:
    length, truncated = run.metric("rollout/completion_length"), run.metric("rollout/truncated_ratio")
    if len(length) < MIN_STEPS or _last(length) < 1.5 * _first(length) or not truncated or _last(truncated) < 0.2:
        return None
    return Advice(
        f"Completions grew from {_first(length):.0f} to {_last(length):.0f} tokens, {_last(truncated):.0%} are cut.",
        "A reverse KL cannot bring back an end-of-text that the student never samples; start from a student that ends "
        "its answers, or look at its last tokens below.",
    )


def _is_cut(run: RunData) -> Advice | None:
    truncated = run.metric("rollout/truncated_ratio")
    if not truncated or _first(truncated) < 0.3:
        return None
    return Advice(
        f"{_first(truncated):.0%} of the first completions were cut at the limit.",
        "Raise rollout.max_completion_tokens, or check that the student knows how to end.",
    )


def _gap(run: RunData) -> Advice | None:
    gap = run.metric("train/sampler_learner_gap")
    if not gap or run.config.rollout.max_staleness or _last(gap) < 0.05:
        return None
    return Advice(
        f"Sampler and learner differ by {_last(gap):.3f} nats per token on the same weights.",
        "Give rollout.engine and learner the same dtype, and float32 logits (head_dtype) to both.",
    )


def _old(run: RunData) -> Advice | None:
    importance = run.metric("train/importance_p99")
    if not importance or not run.config.rollout.max_staleness or _last(importance) < 5:
        return None
    return Advice(
        f"One token in a hundred has an importance ratio above {_last(importance):.1f}: rows are too old.",
        "Lower rollout.max_staleness or the learning rate.",
    )


def _no_fall(run: RunData) -> Advice | None:
    kl = run.metric("train/kl")
    if len(kl) < MIN_STEPS or _last(kl) < 0.95 * _first(kl):
        return None
    return Advice(
        f"The KL did not fall: {_first(kl):.3f} at the beginning, {_last(kl):.3f} at the end.",
        "Look at learning rate and gradient norm; a run of few steps may only need more of them.",
    )


def _collapse(run: RunData) -> Advice | None:
    entropy = run.metric("train/entropy")
    if len(entropy) < MIN_STEPS or _last(entropy) > 0.15 * _first(entropy):
        return None
    return Advice(
        f"The student's entropy fell from {_first(entropy):.3f} to {_last(entropy):.3f} nats per token.",
        "It hardly explores any more; a forward or Jensen-Shannon divergence keeps more of the teacher's breadth.",
    )


def _clipped(run: RunData) -> Advice | None:
    norms, limit = run.metric("train/gradient_norm"), run.config.learner.max_gradient_norm
    if len(norms) < MIN_STEPS or fmean(norm > limit for norm in norms) < 0.9:
        return None
    return Advice(
        f"Nearly every gradient is longer than learner.max_gradient_norm = {limit:g} and is clipped.",
        "Raise the limit, or take the learning rate for what it then is: a step length.",
    )


def _mass(run: RunData) -> Advice | None:
    mass, objective = run.metric("train/student_candidate_mass"), run.config.objective
    if not mass or _first(mass) > 0.9:
        return None
    by_student = "" if objective.support != "topk" else 'objective.support = "student_topk" lists its own likeliest. '
    return Advice(
        f"The candidates held {_first(mass):.0%} of the student's probability at the beginning: of the tokens "
        "outside them the gradient has single samples at best, which is noisier.",
        f"{by_student}A larger objective.support_size lists more of them; keep the residual on.",
    )


def _waits(run: RunData) -> Advice | None:
    names = {name for record in run.records for name in record if name.endswith("/idle_share")}
    idle = {name.split("/")[1]: _last(run.metric(name)) for name in names}
    if len(idle) < 2 or len(run.records) < FIRST_STEPS:
        return None
    busiest = min(idle, key=lambda pool: idle[pool])
    others = ", ".join(f"{pool} {share:.0%}" for pool, share in sorted(idle.items()) if pool != busiest)
    if idle[busiest] > 0.3 and not run.config.rollout.max_staleness:
        return Advice(
            f"All pools wait: {busiest} is idle {idle[busiest]:.0%} of the time, {others}.",
            "Stages wait for each other; rollout.max_staleness = 1 lets the next step begin meanwhile.",
        )
    if max(idle.values()) < 0.5:
        return None
    return Advice(
        f"{busiest} limits the run (idle {idle[busiest]:.0%}); idle are {others}.",
        f'Move workers there: `preceptor scale`, balance = "auto", or `preceptor plan --rates {run.name}`.',
    )


def _restarts(run: RunData) -> Advice | None:
    texts = [event.text for event in run.events if event.kind == "restart"]
    return (
        Advice(f"Workers died: {'; '.join(texts[:5])}.", "Their last words are in the run's `logs`.") if texts else None
    )


CHECKS: tuple[Callable[[RunData], Advice | None], ...] = (
    _gap,
    _strangers,
    _grows,
    _is_cut,
    _old,
    _no_fall,
    _collapse,
    _clipped,
    _mass,
    _waits,
    _restarts,
)
