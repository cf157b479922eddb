"""Names one step's metrics as every sink does; pure, from what the stages reported."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.contracts.batches import BatchHandle, Stage
from cluster.contracts.metrics import Metrics, merge, report
from cluster.weight_sync.manifest import WeightSyncReport

if TYPE_CHECKING:
    from cluster.run.flow import StepBatches


class Stopwatch:
    """Measures named stages."""

    def __init__(self) -> None:
        self.started: dict[str, float] = {}
        self.ended: dict[str, float] = {}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        self.started[stage] = time.perf_counter()
        yield
        self.ended[stage] = time.perf_counter()

    def seconds(self, stage: str) -> float:
        return self.ended[stage] - self.started[stage]


# Of a run without slots, a balancer or teachers that are the student.
DEFAULTS = {"slot/switches": 0.0, "slot/switch_seconds": 0.0, "balance/moves": 0.0, "teacher_age/max": 0.0}


def step_record(
    step: int, batches: "StepBatches", learned: Metrics, synced: WeightSyncReport, watch: Stopwatch
) -> dict[str, float]:
    """Return the record of one step.

    The stages overlap. `generate/seconds` runs from the step's admission to its last completion, `score/seconds` from
    there to the last score, `learn/seconds` is what a rank computed, most of it before, and `learn/wait_seconds` what
    the step still took after the last score, weight sync aside. Rates are tokens over the time in which a stage had
    work.
    """
    scored = batches.finished
    tokens = sum(sum(handle.num_tokens) for handle in scored)
    completion_tokens = sum(sum(handle.num_completion_tokens) for handle in scored)
    values = report(learned)
    generate, learn = batches.generated_at - batches.admitted_at, values.pop("busy_seconds")
    whole, sync = watch.seconds("step"), watch.seconds("sync")
    return {
        "step": step,
        "tokens": tokens,
        "completion_tokens": completion_tokens,
        "rollout/length_cap": batches.sampling.max_completion_tokens,
        **DEFAULTS,
        **report(merge(handle.metrics for handle in scored)),
        **_by_teacher(scored),
        **_staleness(step, scored),
        **_teacher_ages(step, scored),
        **{f"train/{name}": value for name, value in values.items()},
        "step/seconds": whole,
        "step/tokens_per_second": completion_tokens / whole,
        "generate/seconds": generate,
        "generate/tokens_per_second": completion_tokens / generate,
        "generate/queued_completions": _mean_queue(scored, "generate", batches.admitted_at, whole),
        "score/seconds": batches.finished_at - batches.generated_at,
        "score/tokens_per_second": completion_tokens / (batches.finished_at - batches.admitted_at),
        "score/queued_batches": _mean_queue(scored, "score", None, whole),
        "learn/seconds": learn,
        "learn/wait_seconds": watch.started["sync"] - max(batches.finished_at, watch.started["step"]),
        "learn/tokens_per_second": tokens / learn,
        "sync/seconds": sync,
        "sync/bytes": synced.num_bytes,
        **({} if synced.changed_fraction is None else {"sync/changed_fraction": synced.changed_fraction}),
    }


def _staleness(step: int, scored: Sequence[BatchHandle]) -> dict[str, float]:
    """Return how many updates old the oldest token of each trajectory was when it was learned from; not of replayed."""
    sampled = [handle for handle in scored if not handle.is_replayed]
    ages = [step - 1 - version for handle in sampled for version in handle.min_policy_versions]
    return {"staleness/mean": sum(ages) / len(ages), "staleness/max": max(ages)} if ages else {}


def _teacher_ages(step: int, scored: Sequence[BatchHandle]) -> dict[str, float]:
    """Return each self-teacher's newest version, and how many updates old their versions were when learned from."""
    ages, newest = [], dict[str, int]()
    for handle in scored:
        for name, version in handle.teacher_versions.items():
            ages += [step - 1 - version] * len(handle.trajectory_ids)
            newest[name] = max(version, newest.get(name, 0))
    if not ages:
        return {}
    of_each = {f"teacher_version/{name}": float(version) for name, version in newest.items()}
    return {**of_each, "teacher_age/mean": sum(ages) / len(ages), "teacher_age/max": float(max(ages))}


def _mean_queue(scored: Sequence[BatchHandle], stage: Stage, since: float | None, window_seconds: float) -> float:
    """Return how many were under way on average over a window, by Little's law.

    Completions count from the step's admission, `since`, to the answer that brought them; batches, without it, while
    they were at a worker.
    """
    spans = [span for handle in scored for span in handle.spans if span.stage == stage]
    waited = [span.seconds if since is None else span.num_rows * (span.ended - since) for span in spans]
    return sum(waited) / window_seconds


def _by_teacher(scored: Sequence[BatchHandle]) -> dict[str, float]:
    """Return each teacher's own metrics as teacher/NAME/..., where there are several teachers."""
    names = sorted({handle.teacher for handle in scored})
    if len(names) < 2:
        return {}
    values: dict[str, float] = {}
    for name in names:
        own = report(merge(handle.metrics for handle in scored if handle.teacher == name))
        values |= {
            f"teacher/{name}/{key.removeprefix('teacher/')}": value
            for key, value in own.items()
            if key.startswith("teacher/")
        }
    return values
