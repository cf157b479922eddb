"""The balancer on real Ray and the real pools, whose engines only wait."""

from pathlib import Path

import pytest

from benchmarks.cases.balance import Settled, Steps, rows_of
from benchmarks.harness.stub_pools import StubRates
from benchmarks.harness.stub_processes import stub_process_run
from benchmarks.harness.workloads import Split, Workload

# A step's 16 completions take 0.1 s; one teacher reads their 860 tokens in 0.6 s, two in half of that.
TEACHER_BOUND = Workload(
    "teacher-bound",
    StubRates(2e-3, 16, 1500, 1e5, median_length=50, sigma=0.1, longest=80),
    num_replicas=3,
    rows_per_step=16,
)


@pytest.mark.exhaustive
def test_a_worker_moves_to_the_pool_that_holds_the_steps_up(ray_cluster: None, tmp_path: Path) -> None:
    with stub_process_run(TEACHER_BOUND, Split(2, {"main": 1})) as run:
        settled = Steps(run, TEACHER_BOUND).balance(tmp_path)
        states = [pool.state() for pool in (run.rollouts, run.teachers.pools["main"])]
    assert settled.sentences[0].startswith("balance: rollout 2 -> 1, teachers.main 1 -> 2: of a step's ")
    assert settled.sentences[1].startswith("balance: kept rollout=1 teachers.main=2: steps became ")
    assert (str(settled.split), settled.num_moves) == ("rollout=1 teachers.main=2", 1)
    assert [state.serving for state in states] == [["rollout-0"], ["teacher-main-0", "teacher-main-1"]]


def test_the_bar_is_a_tenth_above_the_best_of_what_was_measured_at_the_end() -> None:
    settled = Settled(Split(2, {"main": 1}), num_steps=7, num_moves=2, sentences=())
    finals = {"rollout=2 teachers.main=1": 1.2, "rollout=1 teachers.main=2": 1.0}
    [ratio] = [found for found in rows_of(TEACHER_BOUND, settled, finals) if "bar" in found]
    assert ratio["value"] == pytest.approx(1.2)
    assert not ratio["met"]
