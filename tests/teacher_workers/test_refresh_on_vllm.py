"""A real vLLM teacher takes new weights while it serves, and scores as transformers does with them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from cluster.actors.cluster import RAY, PoolTimeouts
from cluster.actors.object_store import pack
from cluster.config.stages import EngineConfig, RefreshConfig, TeacherConfig, WeightSyncConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated, ragged
from cluster.contracts.wire import from_wire
from learner.weight_sync.object_store import ObjectStoreSender
from teacher_workers.pool import TeacherPool, start_pool
from teacher_workers.router import TeacherRouter
from tests.builders import make_trajectory
from tests.rollout_workers.deployment import FrozenEngine
from tests.tiny_qwen3 import CONTEXT_TOKENS, expected_logprobs, load, write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TOLERANCE = 1e-4  # nats
LONG = 300  # tokens of a prompt: more than two of vLLM's cache blocks, which hold 128 on CPU


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("student"))
    if request.param == "untied":
        model = load(folder)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(ray_cluster: None, folder: Path) -> Iterator[TeacherPool]:
    engine = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1)
    teacher = TeacherConfig(str(folder), source="student", refresh=RefreshConfig(ema=0.5), engine=engine)
    timeouts = PoolTimeouts(start_seconds=500, call_seconds=120)
    pool = start_pool("self", teacher, CONTEXT_TOKENS, [{"num_cpus": 1}], timeouts)
    pool.wait_until_ready()
    yield pool
    pool.shutdown()


def make_handle() -> BatchHandle:
    draw = np.random.default_rng(0)
    rows = [make_trajectory(draw.integers(4, 112, LONG), draw.integers(4, 112, 40), teacher="self")]
    wire, handle = pack(make_generated(rows), {})
    return replace(handle, reference=ray.put(wire))


def change(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def check(pool: TeacherPool, model: Any, version: int) -> None:
    """Check that the pool scores as the model does, and says which version did."""
    teachers = TeacherRouter({"self": pool}, call_seconds=120)
    [handle] = teachers.score([make_handle()], lambda route: [(route, ScoreRequest("teacher"))])
    batch = from_wire(ray.get(handle.reference), "scored")
    token_ids, scores = ragged(batch, "token_ids")[0], ragged(batch, "teacher_logprobs")[0]
    expected = expected_logprobs(model, token_ids.tolist())[LONG - 1 :]
    own = expected[torch.arange(len(scores)), torch.from_numpy(token_ids[LONG:]).long()]
    assert np.abs(scores - own.numpy()).max() < TOLERANCE
    assert batch["teacher_version"].to_pylist() == [version]
    assert handle.teacher_versions == {"self": version}


def test_each_version_scores_as_transformers_does_with_its_weights(pool: TeacherPool, folder: Path) -> None:
    model = load(folder)
    check(pool, model, 0)
    for payload, versions in (("full", (1, 2)), ("delta", (5, 6, 7))):
        sender = ObjectStoreSender(
            FrozenEngine(model), WeightSyncConfig(payload=payload), "float32", 120, "teacher self"
        )
        for version in versions:
            change(model, seed=version)
            sender.publish(pool.replicas.prepared, version)
            check(pool, model, version)
    RAY.call_all(pool.replicas.prepared, "abandon", timeout_seconds=60, waiting_for="the end")
    sender.publish(pool.replicas.prepared, 3)  # a run that went back to a checkpoint
    check(pool, model, 3)
