"""Rollout workers die, fall silent and come back; on actors without engines."""

import os
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import ray

from cluster.actors.cluster import PoolTimeouts, RayCluster
from cluster.actors.liveness import Watch
from cluster.actors.replicas import Supervision
from cluster.actors.restarts import RestartLimit
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ActorError
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import ROLLOUT_ACTOR, RolloutActorSettings, RolloutPool
from tests.rollout_workers.crashing_rollout import START_AGAIN_SECONDS
from tests.rollout_workers.deployment import NUM_PROMPTS, make_prompts

NUM_ROWS = 24
STAND_INS = {ROLLOUT_ACTOR: "tests.rollout_workers.crashing_rollout:CrashingRollout"}
CRASHING = RayCluster(STAND_INS)
SAMPLING = SamplingSettings(64, 1.0)
SILENCE_SECONDS = 5.0  # a worker that lives answers within it, however busy the machine
CALL_SECONDS = 120
NOTICED_SECONDS = CALL_SECONDS / 2  # a death or silence that only a late answer shows takes CALL_SECONDS


@contextmanager
def start(
    folder: Path, num_workers: int, max_restarts: int = 3, cluster: RayCluster = CRASHING
) -> Iterator[RolloutPool]:
    settings = RolloutActorSettings(StudentConfig(str(folder)), EngineConfig(), 512, 1, None)
    with closing(Watch(SILENCE_SECONDS)) as watch:
        pool = RolloutPool(
            settings,
            [{"num_cpus": 0}] * num_workers,
            PoolTimeouts(300, CALL_SECONDS),
            name="writer",
            cluster=cluster,
            supervision=Supervision(RestartLimit(max_restarts, window_seconds=600), watch),
        )
        try:
            pool.wait_until_ready()
            pool.set_prompts(make_prompts())
            yield pool
        finally:
            pool.shutdown()


@pytest.fixture
def pool(tmp_path: Path, ray_cluster: None) -> Iterator[RolloutPool]:
    with start(tmp_path, num_workers=2) as pool:
        yield pool


def requests(count: int = NUM_ROWS) -> tuple[RolloutRequest, ...]:
    return tuple(RolloutRequest(number, number % NUM_PROMPTS, 0, seed=5) for number in range(count))


def generate(pool: RolloutPool, count: int = NUM_ROWS) -> list[BatchHandle]:
    return list(pool.generate(requests(count), SAMPLING))


def ids(handles: list[BatchHandle]) -> list[int]:
    return sorted(key for handle in handles for key in handle.trajectory_ids)


def pids(pool: RolloutPool) -> list[int]:
    found: list[int] = ray.get([actor.pid.remote() for actor in pool.actors])
    return found


def wait_until(pool: RolloutPool, num_workers: int) -> None:
    """Look after an idle pool until so many workers take part."""
    deadline = time.monotonic() + NOTICED_SECONDS
    while len(pool.actors) != num_workers:
        assert time.monotonic() < deadline
        references = pool.maintain()
        pool.collect(ray.wait(references, timeout=0.1)[0] if references else [])
        time.sleep(0.05)


def test_every_completion_is_written_once_though_a_worker_dies(pool: RolloutPool, tmp_path: Path) -> None:
    handles: list[BatchHandle] = []
    for handle in pool.generate(requests(), SAMPLING):
        is_first = all(one.spans[0].worker != "writer-0" for one in handles)
        if is_first and handle.spans[0].worker == "writer-0":
            (tmp_path / "writer-0").touch()  # it dies over one of its next batches, and owes less than at first
        handles.append(handle)
    assert ids(handles) == list(range(NUM_ROWS))
    assert not (tmp_path / "writer-0").exists()  # it did die


def test_every_completion_is_written_once_though_all_workers_die(pool: RolloutPool, tmp_path: Path) -> None:
    for worker in ("writer-0", "writer-1"):
        (tmp_path / worker).touch()
    assert ids(generate(pool)) == list(range(NUM_ROWS))
    assert list(tmp_path.iterdir()) == []


def test_several_rollouts_of_a_dead_worker_go_on_under_their_own_names(pool: RolloutPool, tmp_path: Path) -> None:
    (tmp_path / "writer-1").touch()
    for step in (3, 4):
        pool.submit(step, requests(), SAMPLING)
    found: Counter[tuple[int, int]] = Counter()
    while found.total() < 2 * NUM_ROWS:
        for handle in pool.collect(CRASHING.wait_for_any(pool.maintain, 60, pool.late)):
            found.update((handle.rollout, key) for key in handle.trajectory_ids)
    assert found == Counter((step, key) for step in (3, 4) for key in range(NUM_ROWS))


def test_a_worker_that_came_back_writes_with_the_weights_it_was_brought(pool: RolloutPool, tmp_path: Path) -> None:
    pool.bring_weights_with(lambda actor: actor.bring.remote(7))
    for worker in ("writer-0", "writer-1"):
        (tmp_path / worker).touch()
    generate(pool)
    wait_until(pool, num_workers=2)
    assert {handle.min_policy_versions for handle in generate(pool)} == {(7,)}


def test_a_worker_that_died_while_it_had_nothing_to_do_is_replaced(pool: RolloutPool) -> None:
    before = pids(pool)
    os.kill(before[0], signal.SIGKILL)
    deadline = time.monotonic() + NOTICED_SECONDS
    while len(pool.actors) == 2:  # until it is noticed
        assert time.monotonic() < deadline
        pool.maintain()
        time.sleep(0.1)
    wait_until(pool, num_workers=2)
    assert before[0] not in pids(pool)
    assert before[1] in pids(pool)


def test_a_silent_worker_is_ended_before_its_answer_is_late_and_its_work_done_by_others(pool: RolloutPool) -> None:
    started = time.monotonic()
    os.kill(pids(pool)[0], signal.SIGSTOP)
    assert ids(generate(pool)) == list(range(NUM_ROWS))
    assert time.monotonic() - started < NOTICED_SECONDS


def test_without_restarts_left_the_death_is_one_sentence(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "writer-0").touch()
    with (
        start(tmp_path, num_workers=2, max_restarts=0) as pool,
        pytest.raises(ActorError, match=r"a batch from writer-0: .*writer-0 has no restart left of the 0"),
    ):
        generate(pool)


def test_a_worker_that_never_comes_back_uses_its_restarts_up(tmp_path: Path, ray_cluster: None) -> None:
    with start(tmp_path, num_workers=1, max_restarts=3) as pool:
        (tmp_path / "writer-0").touch()
        (tmp_path / "stillborn").touch()
        with pytest.raises(ActorError, match=r"to start again: .*writer-0 has no restart left of the 3"):
            generate(pool)


def test_a_worker_that_dies_twice_of_the_same_error_is_not_started_again_and_its_output_is_kept(
    tmp_path: Path, ray_cluster: None
) -> None:
    model, logs = tmp_path / "model", tmp_path / "run/logs"
    model.mkdir()
    with start(model, num_workers=1, cluster=RayCluster(STAND_INS, logs)) as pool:
        for name in ("writer-0", "stillborn"):
            (model / name).write_text("Traceback (most recent call last):\nRuntimeError: head_dim=16\n")
        last = rf"its last error: RuntimeError: head_dim=16; its output is in {logs}/writer-0-again-1.log"
        with pytest.raises(ActorError, match=rf"{last}; writer-0 is not started again, for it died of the same error"):
            generate(pool)
    assert pool.state().num_restarts == 1
    assert sorted(path.name for path in logs.iterdir()) == ["writer-0-again-1.log", "writer-0.log"]
    assert "Traceback (most recent" in (logs / "writer-0.log").read_text()


def test_nothing_is_owed_after_abandoning_and_the_same_ids_can_be_asked_anew(pool: RolloutPool) -> None:
    pool.submit(0, requests(), SAMPLING)
    pool.abandon()
    assert pool.maintain() == []
    assert ids(generate(pool)) == list(range(NUM_ROWS))


def test_the_others_write_on_while_one_of_eight_is_away(tmp_path: Path, ray_cluster: None) -> None:
    with start(tmp_path, num_workers=8) as pool:
        moments: dict[str, list[float]] = defaultdict(list)  # worker -> when its rows came
        died_at = 0.0
        for number, handle in enumerate(pool.generate(requests(400), SAMPLING)):
            moments[handle.spans[0].worker].append(time.monotonic())
            if number == 180:
                (tmp_path / "writer-3").touch()
                died_at = time.monotonic()
    del moments["writer-3"]
    assert len(moments) == 7
    while_away = [sum(died_at < at < died_at + START_AGAIN_SECONDS for at in of_one) for of_one in moments.values()]
    # A pool that waited for the eighth would take from each of the others the one row that it was writing.
    assert min(while_away) > 1
