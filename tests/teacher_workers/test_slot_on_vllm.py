"""Two teachers in one slot, and one that follows another, on real engines; without a GPU a sleeping engine ends."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from cluster.actors import PoolTimeouts
from cluster.batch_store import pack
from cluster.contracts.config import EngineConfig, TeacherConfig
from cluster.contracts.interfaces import BatchHandle, ScoreRequest
from cluster.contracts.metrics import Metrics, merge, report
from cluster.contracts.trajectory import Floats, make_generated, ragged
from cluster.contracts.wire import from_wire
from teacher_workers.pool import TeacherPool
from teacher_workers.pools import Successors, TeacherPools
from teacher_workers.scorers import Scorers
from tests.builders import make_trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engines to start

EMBEDDED = Path(__file__).parents[2] / "cluster" / "embedded"
CONTEXT_TOKENS = 128
TIMEOUTS = PoolTimeouts(start_seconds=500, call_seconds=120)
TOLERANCE = 1e-4  # nats; the same fp32 model in batches of other compositions
ENGINE = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1)
MODELS = {"math": "teacher", "code": "student"}


def start(label: str, *names: str) -> Scorers:
    teachers = {name: TeacherConfig(str(EMBEDDED / MODELS[name]), engine=ENGINE) for name in names}
    return Scorers(label, teachers, CONTEXT_TOKENS, [{"num_cpus": 1}])


@pytest.fixture(scope="module")
def scorers(ray_cluster: None) -> Iterator[dict[str, Scorers]]:
    """Start each teacher by itself, and both in one slot."""
    started = {"math": start("teacher-math", "math"), "code": start("teacher-code", "code")}
    started["slot"] = start("slot-both", "math", "code")
    for label, found in started.items():
        found.wait_until_ready(TIMEOUTS.start_seconds, label)
    yield started
    for found in started.values():
        found.shutdown()


def batches(routes: list[str], first_step: int | None = None) -> list[BatchHandle]:
    """Make one batch of two rows per route, the same ones each time; each of a step of its own, or all of none."""
    found = []
    for number, route in enumerate(routes):
        draw = np.random.default_rng(number)
        rows = [
            make_trajectory(
                draw.integers(4, 112, 6), draw.integers(4, 112, 40), trajectory_id=2 * number + row, teacher=route
            )
            for row in range(2)
        ]
        wire, handle = pack(make_generated(rows), {})
        step = -1 if first_step is None else first_step + number
        found.append(replace(handle, reference=ray.put(wire), rollout=step))
    return found


def score(pools: TeacherPools, handles: list[BatchHandle]) -> tuple[list[Floats], Metrics]:
    """Return the scores of each batch, in order, and all figures."""
    found = {handle.trajectory_ids: handle for handle in pools.score(handles, lambda route: [(route, REQUEST)])}
    ordered = [found[handle.trajectory_ids] for handle in handles]
    columns = [ragged(from_wire(ray.get(handle.reference), "scored"), "teacher_logprobs").values for handle in ordered]
    return columns, merge(handle.metrics for handle in ordered)


REQUEST = ScoreRequest("teacher")


def test_two_teachers_in_one_slot_score_as_each_does_by_itself(scorers: dict[str, Scorers]) -> None:
    routes = ["math", "code"] * 3
    alone = TeacherPools({name: TeacherPool(name, scorers[name], TIMEOUTS) for name in MODELS}, call_seconds=120)
    shared = TeacherPools({name: TeacherPool(name, scorers["slot"], TIMEOUTS) for name in MODELS}, call_seconds=120)
    expected, _ = score(alone, batches(routes))
    found, metrics = score(shared, batches(routes))
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=TOLERANCE)
    figures = report(metrics)
    assert figures["slot/switches"] == 1  # the engine that started last was awake, and all was there at once
    assert 0 < figures["slot/switch_seconds"] < 120
    # And back again: an engine that slept scores as it did before.
    again, _ = score(shared, batches(["code"]))
    alone_again, _ = score(alone, batches(["code"]))
    np.testing.assert_allclose(again[0], alone_again[0], atol=TOLERANCE)


def test_another_checkpoint_scores_from_its_step_on_and_none_before(scorers: dict[str, Scorers]) -> None:
    old, new = (TeacherPool("math", scorers[name], TIMEOUTS) for name in ("math", "code"))
    by_old, _ = score(TeacherPools({"math": old}, call_seconds=120), batches(["math"] * 4))
    by_new, _ = score(TeacherPools({"math": new}, call_seconds=120), batches(["math"] * 4))
    pools = TeacherPools({"math": old}, call_seconds=120)
    successors = Successors({"math": new})
    pools.prepare(successors)
    pools.succeed(successors, first_step=7)
    found, _ = score(pools, batches(["math"] * 4, first_step=5))
    for number, expected in enumerate([*by_old[:2], *by_new[2:]]):
        np.testing.assert_allclose(found[number], expected, atol=TOLERANCE)
        assert np.abs(by_old[number] - by_new[number]).mean() > 0.1  # they are two models
