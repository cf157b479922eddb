from dataclasses import replace
from typing import Any

import pytest

from cluster.contracts.batches import BatchHandle, Span
from cluster.contracts.metrics import Mean, Sum
from cluster.contracts.requests import SamplingSettings
from cluster.run.flow import StepBatches
from cluster.run.step_metrics import Stopwatch, step_record
from cluster.weight_sync.manifest import WeightSyncReport


def make_watch(**spans: tuple[float, float]) -> Stopwatch:
    watch = Stopwatch()
    for stage, (started, ended) in spans.items():
        watch.started[stage], watch.ended[stage] = started, ended
    return watch


def make_handle(num_tokens: tuple[int, ...], reward: Mean, teacher: str = "main", **metrics: Mean) -> BatchHandle:
    completion = tuple(length - 10 for length in num_tokens)
    ids = tuple(range(len(num_tokens)))
    figures = {"rollout/reward": reward, "rows": Sum(len(ids)), **{f"teacher/{k}": v for k, v in metrics.items()}}
    return BatchHandle(None, teacher, ids, num_tokens, completion, min_policy_versions=(1,) * len(ids), metrics=figures)


def make_batches(handles: list[BatchHandle]) -> StepBatches:
    """Make a step that was admitted at 0 s, generated at 4 s and scored at 5 s."""
    flow: Any = None  # nothing moves on it
    return StepBatches(
        (),
        SamplingSettings(1, 1.0),
        lambda route: [],
        flow,
        0,
        admitted_at=0.0,
        generated_at=4.0,
        finished_at=5.0,
        finished=handles,
    )


WATCH = make_watch(step=(0.0, 7.5), sync=(7.0, 7.5))
SYNCED = WeightSyncReport(policy_version=3, checksum="c", num_bytes=100, seconds=0.4)
BUSY = {"busy_seconds": Sum(2.5)}


def test_a_record_joins_what_every_stage_reported() -> None:
    handles = [make_handle((30, 20), Mean(1.0, 2)), make_handle((15,), Mean(1.0, 1))]
    record = step_record(3, make_batches(handles), {"kl": Mean(6.0, 3), **BUSY}, SYNCED, WATCH)
    assert record["rollout/reward"] == pytest.approx(2 / 3)
    assert record["train/kl"] == 2.0
    assert record["generate/tokens_per_second"] == 35 / 4
    assert record["score/tokens_per_second"] == 35 / 5
    assert record["score/seconds"] == 1.0  # the part that generation did not hide
    assert record["learn/seconds"] == 2.5
    assert record["learn/wait_seconds"] == 2.0  # the part that generation and scoring did not hide
    assert record["learn/tokens_per_second"] == 65 / 2.5
    assert record["step/tokens_per_second"] == 35 / 7.5
    assert (record["step"], record["sync/bytes"], record["sync/seconds"]) == (3, 100, 0.5)


def test_staleness_counts_the_updates_between_writing_and_learning() -> None:
    # Step 3 changes the weights from version 2 to 3; what version 1 wrote is one update old by then.
    record = step_record(3, make_batches([make_handle((30, 20), Mean(1.0, 2))]), BUSY, SYNCED, WATCH)
    assert (record["staleness/mean"], record["staleness/max"]) == (1.0, 1)


def test_several_teachers_have_their_own_figures_beside_the_common_ones() -> None:
    handles = [
        make_handle((30,), Mean(1.0, 1), teacher="math", sampled_kl=Mean(2.0, 1)),
        make_handle((30,), Mean(1.0, 1), teacher="code", sampled_kl=Mean(1.0, 3)),
    ]
    record = step_record(1, make_batches(handles), BUSY, SYNCED, WATCH)
    assert record["teacher/math/sampled_kl"] == 2.0
    assert record["teacher/code/sampled_kl"] == pytest.approx(1 / 3)
    assert record["teacher/sampled_kl"] == 0.75


def test_queues_are_what_waited_over_the_seconds_of_the_step() -> None:
    written = Span("rollout", "rollout-0", "generate", began=1.0, ended=3.0, num_rows=2)
    scored = Span("teacher-main", "teacher-main-0", "score", began=3.0, ended=4.5, num_rows=2)
    handle = replace(make_handle((30, 20), Mean(1.0, 2)), spans=(written, scored))
    record = step_record(3, make_batches([handle]), BUSY, SYNCED, WATCH)
    assert record["generate/queued_completions"] == pytest.approx(2 * 3.0 / 7.5)  # two, owed from 0 s to 3 s
    assert record["score/queued_batches"] == pytest.approx(1.5 / 7.5)


def test_the_age_of_a_self_teacher_counts_the_updates_since_its_weights() -> None:
    old = replace(make_handle((30, 20, 12), Mean(1.0, 1)), teacher_versions={"self": 0})
    new = replace(make_handle((15,), Mean(1.0, 1)), teacher_versions={"self": 2})
    record = step_record(3, make_batches([old, new]), BUSY, SYNCED, WATCH)
    assert (record["teacher_version/self"], record["teacher_age/mean"], record["teacher_age/max"]) == (2.0, 1.5, 2.0)
    other = step_record(3, make_batches([make_handle((30,), Mean(1.0, 1))]), BUSY, SYNCED, WATCH)
    assert other["teacher_age/max"] == 0.0
