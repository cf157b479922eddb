import json
from pathlib import Path
from typing import Any

from cluster.contracts.batches import PoolState, Span
from cluster.monitoring.observers import StepSample
from cluster.monitoring.trace import Trace, timeline

ROLLOUT = PoolState("rollout", ["rollout-0", "rollout-1"], 2, 0)


def step(number: int) -> StepSample:
    at = float(number)
    spans = [
        Span("learner", "learner-0", "sync", at + 0.5, at + 0.6),
        Span("rollout", "rollout-0", "generate", at, at + 0.4, 8, 80),
    ]
    return StepSample({"step": number}, [], spans, [ROLLOUT])


def events(path: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == name]


def test_the_first_and_the_last_steps_stay_and_those_between_go(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    trace = Trace(path, num_steps=2)
    trace.on_step(step(1))
    assert not path.exists()
    trace.on_step(step(2))
    assert [event["ts"] for event in events(path, "generate")] == [0.0, 1e6]
    for number in range(3, 8):
        trace.on_step(step(number))
    trace.close("ended")
    assert [event["ts"] for event in events(path, "generate")] == [0.0, 1e6, 5e6, 6e6]


def test_a_run_that_ends_early_has_its_steps(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", num_steps=10)
    trace.on_step(step(1))
    trace.close("failed")
    assert len(events(tmp_path / "trace.json", "generate")) == 1


def test_every_rollout_worker_has_the_weight_sync_on_its_own_track(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json", num_steps=1)
    trace.on_step(step(1))
    names = {event["pid"]: event["args"]["name"] for event in events(tmp_path / "trace.json", "process_name")}
    synced = [(names[event["pid"]], event["ts"]) for event in events(tmp_path / "trace.json", "sync")]
    assert synced == [("rollout-0", 5e5), ("rollout-1", 5e5), ("learner-0", 5e5)]


def test_calls_of_a_worker_that_overlap_lie_beside_each_other() -> None:
    times = [(0.0, 4.0), (1.0, 2.0), (2.0, 5.0), (4.0, 6.0)]
    spans = [Span("teacher-a", "teacher-a-0", "score", began, ended, 1, 1) for began, ended in times]
    shown = [event for event in timeline(spans)["traceEvents"] if event["ph"] == "X"]
    assert [event["tid"] for event in shown] == [0, 1, 1, 0]


def test_the_calls_of_a_worker_that_two_teachers_share_are_shown_once_with_their_teacher() -> None:
    spans = [Span(f"teacher-{name}", "slot-both-0", "score", 0.0, 1.0, 1, 1) for name in ("math", "code")]
    shown = [event for event in timeline(spans)["traceEvents"] if event["ph"] == "X"]
    assert [(event["pid"], event["args"]["pool"]) for event in shown] == [(1, "teacher-code"), (1, "teacher-math")]


def test_workers_stand_in_the_order_of_the_data() -> None:
    workers = [("learner", "learner-0"), ("teacher-a", "teacher-a-0"), ("rollout", "rollout-0")]
    spans = [Span(pool, worker, "sync", 0.0, 1.0) for pool, worker in workers]
    named = [event["args"]["name"] for event in timeline(spans)["traceEvents"] if event["name"] == "process_name"]
    assert named == ["rollout-0", "teacher-a-0", "learner-0"]
