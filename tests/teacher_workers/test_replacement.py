"""Teachers' pools that are replaced by others, share their workers or have none; on actors without engines."""

import time
from collections.abc import Callable, Iterator, Sequence
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
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated, ragged
from cluster.contracts.wire import from_wire
from teacher_workers.pool import TEACHER_ACTOR, TeacherPool, TeacherReplicas, start_pool
from teacher_workers.replacement import ReplaceableTeachers, Replacement
from teacher_workers.time_sharing import SLOT_ACTOR, start_slot
from tests.builders import make_trajectory

CONSTANT_TEACHER = "tests.teacher_workers.constant_teacher:ConstantTeacher"
CONSTANT = RayCluster({TEACHER_ACTOR: CONSTANT_TEACHER, SLOT_ACTOR: CONSTANT_TEACHER})
TIMEOUTS = PoolTimeouts(start_seconds=300, call_seconds=120)
LIMIT = RestartLimit(max_restarts=2, window_seconds=600)

Start = Callable[..., dict[str, TeacherPool]]


@pytest.fixture
def start(tmp_path: Path, ray_cluster: None) -> Iterator[Start]:
    """Start the workers of some teachers, by their models, and return their pools."""
    started: list[TeacherReplicas] = []

    def begin(label: str, num_workers: int = 1, max_restarts: int = 2, **models: str) -> dict[str, TeacherPool]:
        teachers = {
            name: TeacherConfig(str(tmp_path / model), num_workers=num_workers) for name, model in models.items()
        }
        limit = replace(LIMIT, max_restarts=max_restarts)
        options = [{"num_cpus": 0}] * max(1, num_workers)
        supervision = Supervision(limit)
        if len(teachers) > 1:
            pools = start_slot(label, teachers, 512, options, TIMEOUTS, CONSTANT, supervision)
        else:
            [(name, teacher)] = teachers.items()
            pools = {name: start_pool(name, teacher, 512, options, TIMEOUTS, CONSTANT, supervision, label)}
        for name, pool in pools.items():
            pool.checkpoint = models[name]
            started.append(pool.replicas)
        return pools

    yield begin
    for replicas in started:
        replicas.shutdown()


def batch(step: int = -1, teacher: str = "main", trajectory_id: int = 0) -> BatchHandle:
    wire, handle = pack(make_generated([make_trajectory(trajectory_id=trajectory_id, teacher=teacher)]), {})
    return replace(handle, reference=ray.put(wire), rollout=step)


def go_on(pools: ReplaceableTeachers, until: Callable[[], bool]) -> list[BatchHandle]:
    """Do what a driver does while it waits, and return what was scored."""
    scored = []
    deadline = time.monotonic() + 240
    while not until():
        assert time.monotonic() < deadline, "it took too long"
        references = pools.maintain()
        ready = ray.wait(references, timeout=0.05)[0] if references else []
        scored += pools.collect(ready)
    return scored


def scores(pools: ReplaceableTeachers, handles: Sequence[BatchHandle]) -> list[float]:
    """Return what each batch's tokens were given, in the batches' order."""
    for handle in handles:
        pools.submit(handle, [(handle.teacher, ScoreRequest("teacher"))])
    found: dict[int, float] = {}
    while len(found) < len(handles):
        ready = CONSTANT.wait_for_any(pools.maintain, 60, lambda: "scores")
        for handle in pools.collect(ready):
            values = ragged(from_wire(ray.get(handle.reference), "scored"), "teacher_logprobs").values
            assert handle.trajectory_ids[0] not in found
            found[handle.trajectory_ids[0]] = float(values[0])
            assert handle.scored_by == {handle.teacher: f"{values[0]:.0f}"}
    return [found[handle.trajectory_ids[0]] for handle in handles]


def switch(pools: ReplaceableTeachers, replacement: Replacement, first_step: int) -> None:
    pools.prepare(replacement)
    go_on(pools, until=lambda: bool(replacement.replicas.serving))
    pools.switch(replacement, first_step)


def is_alive(actor: str) -> bool:
    try:
        ray.get_actor(actor)
    except ValueError:
        return False
    return True


def test_a_step_is_scored_by_the_checkpoint_that_it_was_asked_for_under(start: Start) -> None:
    old = start("teacher-main", main="-1")
    old["main"].wait_until_ready()
    pools = ReplaceableTeachers(old, call_seconds=60)
    steps = [2, 3, 4, -5]
    handles = [batch(step, trajectory_id=number) for number, step in enumerate(steps)]
    assert scores(pools, handles) == [-1, -1, -1, -1]
    switch(pools, Replacement(start("teacher-main@new", main="-2")), first_step=3)
    # Batches of step 2 may come late; an evaluation, which is of no step, is for the teacher of now.
    assert scores(pools, handles) == [-1, -2, -2, -2]
    assert is_alive("teacher-main-0")
    pools.close(next_step=2)
    assert scores(pools, handles) == [-1, -2, -2, -2]
    pools.close(next_step=3)
    go_on(pools, until=lambda: not is_alive("teacher-main-0"))
    assert pools.pools["main"].state().checkpoint == "-2"
    assert scores(pools, handles[1:]) == [-2, -2, -2]


def test_two_replacements_in_a_row_keep_each_step_with_its_own(start: Start) -> None:
    old = start("teacher-main", main="-1")
    old["main"].wait_until_ready()
    pools = ReplaceableTeachers(old, call_seconds=60)
    switch(pools, Replacement(start("teacher-main@two", main="-2")), first_step=3)
    switch(pools, Replacement(start("teacher-main@three", main="-3")), first_step=4)
    handles = [batch(step, trajectory_id=step) for step in (2, 3, 4)]
    assert scores(pools, handles) == [-1, -2, -3]


def test_steps_that_are_done_again_are_scored_by_the_teacher_of_now(start: Start) -> None:
    old = start("teacher-main", main="-1")
    old["main"].wait_until_ready()
    pools = ReplaceableTeachers(old, call_seconds=60)
    switch(pools, Replacement(start("teacher-main@new", main="-2")), first_step=3)
    pools.abandon()
    assert scores(pools, [batch(0)]) == [-2]
    go_on(pools, until=lambda: not is_alive("teacher-main-0"))


def test_a_checkpoint_that_cannot_be_served_ends_nothing(start: Start) -> None:
    old = start("teacher-main", main="-1")
    old["main"].wait_until_ready()
    pools = ReplaceableTeachers(old, call_seconds=60)
    replacement = Replacement(start("teacher-main@new", max_restarts=1, main="broken"))
    pools.prepare(replacement)
    go_on(pools, until=lambda: replacement.error is not None)
    assert "cannot serve broken" in str(replacement.error)
    assert scores(pools, [batch(0)]) == [-1]
    pools.cancel(replacement)
    assert pools.replacements == []
    assert scores(pools, [batch(1)]) == [-1]


def test_who_lent_a_place_to_a_successor_that_failed_gets_it_back(start: Start) -> None:
    old = start("teacher-main", num_workers=2, main="-1")
    old["main"].wait_until_ready()
    pools = ReplaceableTeachers(old, call_seconds=60)
    replacement = Replacement(start("teacher-main@new", main="-2"), num_borrowed=1)
    pools.pools["main"].resize(1)
    pools.prepare(replacement)
    pools.cancel(replacement)
    assert pools.pools["main"].size == 2


def test_the_teachers_of_a_slot_share_its_workers_and_score_for_themselves(start: Start) -> None:
    slot = start("slot-both", num_workers=2, math="-1", code="-2")
    for pool in slot.values():
        pool.wait_until_ready()
    pools = ReplaceableTeachers(slot, call_seconds=60)
    handles = [batch(0, ("math", "code")[number % 2], number) for number in range(8)]
    assert scores(pools, handles) == [-1, -2] * 4
    assert [pool.state().serving for pool in slot.values()] == [["slot-both-0", "slot-both-1"]] * 2
    slot["math"].resize(1)
    assert slot["code"].size == 1


def test_every_batch_of_a_slot_is_scored_once_though_its_workers_die(start: Start, tmp_path: Path) -> None:
    slot = start("slot-both", num_workers=2, math="-1", code="-2")
    slot["math"].wait_until_ready()
    pools = ReplaceableTeachers(slot, call_seconds=60)
    for replica in (0, 1):
        (tmp_path / f"slot-both-{replica}").touch()
    handles = [batch(0, ("math", "code")[number % 2], number) for number in range(12)]
    assert scores(pools, handles) == [-1, -2] * 6
    assert list(tmp_path.iterdir()) == []
    # Both pools found each death, and each was dealt with once.
    assert slot["math"].state().num_restarts == 2


def test_rows_of_a_teacher_without_workers_wait_until_some_are_added(start: Start) -> None:
    pools = ReplaceableTeachers(start("teacher-main", num_workers=0, main="-1"), call_seconds=60)
    pools.pools["main"].wait_until_ready()
    pools.submit(batch(0), [("main", ScoreRequest("teacher"))])
    assert pools.collect(pools.maintain()) == []
    pools.pools["main"].resize(1)
    assert [handle.trajectory_ids for handle in go_on(pools, until=lambda: pools.is_idle)] == [(0,)]


def test_a_drained_teacher_has_no_worker_and_can_be_brought_back(start: Start) -> None:
    pools = ReplaceableTeachers(start("teacher-main", num_workers=2, main="-1"), call_seconds=60)
    pools.pools["main"].wait_until_ready()
    pools.pools["main"].resize(0)
    go_on(pools, until=lambda: not is_alive("teacher-main-0") and not is_alive("teacher-main-1"))
    assert pools.pools["main"].state().num_wanted == 0
    pools.pools["main"].resize(1)
    assert scores(pools, [batch(0)]) == [-1]
