import pytest

from benchmarks.cases.plan import compare, predict, true_rates
from benchmarks.harness.plan_measuring import Measured, measured_splits
from benchmarks.harness.workloads import WORKLOADS, Split, Workload
from cluster.contracts.batches import Span


def measured_as(workload: Workload, factor: float) -> list[Measured]:
    """Return a probe of one small rollout, and a measurement that differs from the prediction by a factor."""
    record = {
        "step": 3,
        "tokens": 2200.0,
        "completion_tokens": 2000.0,
        "rollout/completion_length": 100.0,
        "rollout/completion_length_max": 200.0,
        "learn/tokens_per_second": 8000.0,
        "sync/seconds": 0.0,
    }
    spans = [
        Span("rollout", "rollout-0", "generate", 0.0, 1.0, 8, 800, 0, (100,) * 8),
        *(Span(f"teacher-{name}", f"teacher-{name}-0", "score", 1.0, 1.5, 8, 864) for name in workload.teachers),
    ]
    split = measured_splits(workload)[0]
    probe = Measured(workload.name, split, [1.0], [record], spans)
    return [probe, Measured(workload.name, split, [factor * predict(workload, true_rates(workload), split)])]


@pytest.mark.parametrize(("factor", "is_met"), [(1.05, True), (1.2, False), (0.8, False)])
def test_a_prediction_is_right_within_ten_per_cent(factor: float, is_met: bool) -> None:
    workload = WORKLOADS[0]
    rows = [found for found in compare(workload, measured_as(workload, factor)) if "predicted" in found["name"]]
    assert [found["met"] for found in rows] == [is_met]
    assert rows[0]["value"] == pytest.approx(1 / factor, rel=1e-4)


def test_the_five_workloads_differ_and_share_out_all_replicas() -> None:
    assert len({workload.name for workload in WORKLOADS}) == 5
    for workload in WORKLOADS:
        for split in workload.splits:
            assert split.rollout + sum(split.teachers.values()) == workload.num_replicas
        assert sorted(set(workload.routes)) == sorted(workload.teachers)


def test_the_workloads_that_a_stage_bounds_prefer_workers_of_that_stage() -> None:
    rollout_bound, teacher_bound = WORKLOADS[:2]
    many_writers, many_readers = Split(6, {"main": 2}), Split(3, {"main": 5})
    for workload, better, worse in (
        (rollout_bound, many_writers, many_readers),
        (teacher_bound, many_readers, many_writers),
    ):
        rates = true_rates(workload)
        assert predict(workload, rates, better) < predict(workload, rates, worse)
