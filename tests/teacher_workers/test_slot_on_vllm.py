"""Two teachers in one slot on real engines, against transformers; without a GPU a sleeping engine ends."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from cluster.actors.cluster import PoolTimeouts
from cluster.actors.object_store import pack
from cluster.config.stages import EngineConfig, TeacherConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.metrics import Metrics, merge, report
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import Floats, make_generated, ragged
from cluster.contracts.wire import from_wire
from teacher_workers.pool import TeacherPool
from teacher_workers.replacement import ReplaceableTeachers, Replacement
from teacher_workers.router import TeacherRouter
from teacher_workers.time_sharing import start_slot
from tests.builders import make_trajectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engines to start

EMBEDDED = Path(__file__).parents[2] / "cluster" / "embedded"
CONTEXT_TOKENS = 128
TIMEOUTS = PoolTimeouts(start_seconds=500, call_seconds=120)
TOLERANCE = 1e-3  # nats; two implementations of the same fp32 model, on random tokens
MODELS = {"math": "teacher", "code": "student"}
REQUEST = ScoreRequest("teacher")


@pytest.fixture(scope="module")
def slot(ray_cluster: None) -> Iterator[dict[str, TeacherPool]]:
    """Start a worker with both engines, of which the last one is awake then."""
    engine = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1)
    teachers = {name: TeacherConfig(str(EMBEDDED / model), engine=engine) for name, model in MODELS.items()}
    pools = start_slot("slot-both", teachers, CONTEXT_TOKENS, [{"num_cpus": 1}], TIMEOUTS)
    pools["math"].wait_until_ready()
    yield pools
    pools["math"].shutdown()


def make_batches(routes: list[str], steps: list[int]) -> list[BatchHandle]:
    """Make one batch of two rows per route and step; the first of each call are alike."""
    found = []
    for number, (route, step) in enumerate(zip(routes, steps, strict=True)):
        draw = np.random.default_rng(number)
        rows = [
            make_trajectory(
                draw.integers(4, 112, 6), draw.integers(4, 112, 40), trajectory_id=2 * number + row, teacher=route
            )
            for row in range(2)
        ]
        wire, handle = pack(make_generated(rows), {})
        found.append(replace(handle, reference=ray.put(wire), rollout=step))
    return found


@torch.no_grad()
def expected_scores(name: str, handles: list[BatchHandle]) -> list[Floats]:
    """Return the scores of every batch by a teacher's model alone."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / MODELS[name], dtype=torch.float32)
    found = []
    for handle in handles:
        batch = from_wire(ray.get(handle.reference))
        rows = []
        for row in range(batch.num_rows):
            ids = torch.from_numpy(ragged(batch, "token_ids")[row].astype(np.int64))
            logprobs = model(ids[None]).logits[0].log_softmax(-1)
            rows.append(logprobs[5:-1].gather(1, ids[6:, None]).squeeze(1).numpy())
        found.append(np.concatenate(rows))
    return found


def score(pools: TeacherRouter, handles: list[BatchHandle]) -> tuple[list[Floats], Metrics]:
    """Return the scores of each batch, in order, and all figures."""
    found = {handle.trajectory_ids: handle for handle in pools.score(handles, lambda route: [(route, REQUEST)])}
    ordered = [found[handle.trajectory_ids] for handle in handles]
    columns = [ragged(from_wire(ray.get(handle.reference), "scored"), "teacher_logprobs").values for handle in ordered]
    return columns, merge(handle.metrics for handle in ordered)


def test_two_teachers_in_one_slot_score_as_each_does_by_itself(slot: dict[str, TeacherPool]) -> None:
    pools = TeacherRouter(slot, call_seconds=120)
    routes = ["math", "code"] * 3
    handles = make_batches(routes, steps=[-1] * 6)
    found, metrics = score(pools, handles)
    expected = {name: expected_scores(name, handles) for name in MODELS}
    for number, route in enumerate(routes):
        np.testing.assert_allclose(found[number], expected[route][number], atol=TOLERANCE)
    figures = report(metrics)
    assert figures["slot/switches"] == 1  # all was there at once
    assert 0 < figures["slot/switch_seconds"] < 120


@pytest.mark.exhaustive  # without engines: test_replacement.py
def test_another_checkpoint_scores_from_its_step_on_and_none_before(slot: dict[str, TeacherPool]) -> None:
    pools = ReplaceableTeachers({"main": slot["math"]}, call_seconds=120)
    replacement = Replacement({"main": slot["code"]})
    pools.prepare(replacement)
    pools.switch(replacement, first_step=7)
    handles = make_batches(["main"] * 4, steps=[5, 6, 7, 8])
    old, new = (expected_scores(name, handles) for name in ("math", "code"))
    found, _ = score(pools, handles)
    for number, expected in enumerate([*old[:2], *new[2:]]):
        np.testing.assert_allclose(found[number], expected, atol=TOLERANCE)
        assert np.abs(old[number] - new[number]).mean() > 0.1  # they are two models
