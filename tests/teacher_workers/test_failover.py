"""A teacher's replicas die and come back; on actors without engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cluster.actors.cluster import PoolTimeouts, RayCluster
from cluster.actors.object_store import pack
from cluster.actors.replicas import Supervision
from cluster.actors.restarts import RestartLimit
from cluster.config.stages import TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ActorError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated
from teacher_workers.pool import TEACHER_ACTOR, start_pool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory

NUM_BATCHES = 12
CRASHING = RayCluster({TEACHER_ACTOR: "tests.teacher_workers.crashing_teacher:CrashingTeacher"})
TIMEOUTS = PoolTimeouts(start_seconds=300, call_seconds=120)


@contextmanager
def start(folder: Path, num_replicas: int, max_restarts: int) -> Iterator[TeacherRouter]:
    pool = start_pool(
        "main",
        TeacherConfig(str(folder)),
        512,
        [{"num_cpus": 0}] * num_replicas,
        TIMEOUTS,
        CRASHING,
        supervision=Supervision(RestartLimit(max_restarts, window_seconds=600)),
    )
    try:
        pool.wait_until_ready()
        yield TeacherRouter({"main": pool}, call_seconds=60)
    finally:
        pool.shutdown()


@pytest.fixture
def teachers(tmp_path: Path, ray_cluster: None) -> Iterator[TeacherRouter]:
    with start(tmp_path, num_replicas=2, max_restarts=2) as pools:
        yield pools


def handles() -> list[BatchHandle]:
    found = []
    for trajectory_id in range(NUM_BATCHES):
        wire, handle = pack(make_generated([make_trajectory(trajectory_id=trajectory_id, teacher="main")]), {})
        found.append(replace(handle, reference=ray.put(wire)))
    return found


def score(teachers: TeacherRouter) -> list[int]:
    """Return the ids of all scored trajectories."""
    scored = teachers.score(handles(), lambda route: [(route, ScoreRequest("teacher"))])
    return [key for handle in scored for key in handle.trajectory_ids]


def test_every_batch_is_scored_once_though_a_replica_dies(teachers: TeacherRouter, tmp_path: Path) -> None:
    (tmp_path / "teacher-main-0").touch()
    assert sorted(score(teachers)) == list(range(NUM_BATCHES))
    assert not (tmp_path / "teacher-main-0").exists()  # it did die


def test_a_pool_says_who_scored_and_how_often_it_started_one_again(teachers: TeacherRouter, tmp_path: Path) -> None:
    (tmp_path / "teacher-main-0").touch()
    scored = teachers.score(handles(), lambda route: [(route, ScoreRequest("teacher"))])
    spans = [span for handle in scored for span in handle.spans]
    assert len(spans) == NUM_BATCHES
    assert {(span.pool, span.stage, span.num_rows) for span in spans} == {("teacher-main", "score", 1)}
    assert {span.worker for span in spans} <= {"teacher-main-0", "teacher-main-1"}
    state = teachers.pools["main"].state()
    assert (state.name, state.num_wanted, state.num_restarts, state.num_owed) == ("teacher-main", 2, 1, 0)


def test_every_batch_is_scored_once_though_all_replicas_die(teachers: TeacherRouter, tmp_path: Path) -> None:
    for replica in (0, 1):
        (tmp_path / f"teacher-main-{replica}").touch()
    assert sorted(score(teachers)) == list(range(NUM_BATCHES))
    assert list(tmp_path.iterdir()) == []


def test_a_replica_that_came_back_serves_again(teachers: TeacherRouter, tmp_path: Path) -> None:
    (tmp_path / "teacher-main-0").touch()
    score(teachers)
    (tmp_path / "teacher-main-1").touch()
    assert sorted(score(teachers)) == list(range(NUM_BATCHES))


def test_without_restarts_left_the_death_is_one_sentence(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "teacher-main-0").touch()
    with (
        start(tmp_path, num_replicas=2, max_restarts=0) as teachers,
        pytest.raises(ActorError, match=r"scores from teacher-main-0: .*teacher-main-0 has no restart left of the 0"),
    ):
        score(teachers)


def test_a_replica_that_never_comes_back_uses_the_restarts_up(tmp_path: Path, ray_cluster: None) -> None:
    with start(tmp_path, num_replicas=1, max_restarts=3) as teachers:
        (tmp_path / "teacher-main-0").touch()
        (tmp_path / "stillborn").touch()
        with pytest.raises(ActorError, match=r"to start again: .*has no restart left of the 3 that ray.max_restarts"):
            score(teachers)
