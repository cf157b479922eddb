"""Real vLLM teachers pass their audits beside other work; other weights under the same name do not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors.object_store import pack
from cluster.config.run_config import Config
from cluster.config.stages import Dtype
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated
from teacher_workers.audit.runner import ScoreAudit, audit_request
from teacher_workers.pool import TeacherPool
from tests.builders import make_config, make_trajectory
from tests.teacher_workers.conftest import start
from tests.tiny_qwen3 import write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def make_run(model: Path, dtype: str, objective: str) -> Config:
    return make_config(
        f"teachers.main.model={model}",
        f"teachers.main.engine.dtype={dtype}",
        "teachers.main.engine.kv_cache_gib=0.1",
        "teachers.main.engine.cpu_threads=1",
        f"objective={objective}",
    )


def make_handle(seed: int, lengths: list[int]) -> BatchHandle:
    draw = np.random.default_rng(seed)
    rows = [make_trajectory(draw.integers(4, 112, 5), draw.integers(4, 112, length)) for length in lengths]
    wire, handle = pack(make_generated(rows), {})
    return replace(handle, reference=ray.put(wire))


def work(pool: TeacherPool, seed: int, request: ScoreRequest) -> list[Any]:
    """Let every replica score other batches, which its engine mixes with the probes."""
    handles = [make_handle(100 * seed + index, [20 + 13 * index, 90, 33]) for index in range(4)]
    return [pool.ask(replica, handle, request)[1] for replica in pool.serving() for handle in handles]


def run_audit(audit: ScoreAudit, pool: TeacherPool, step: int, request: ScoreRequest) -> None:
    """Audit in the middle of other work, and expect nothing."""
    before = work(pool, 2 * step + 1, request)
    audit.begin(step)
    after = work(pool, 2 * step + 2, request)
    assert audit.finish() == []
    ray.get([*before, *after], timeout=120)


@pytest.mark.parametrize(
    ("served", "dtype", "objective"),
    [
        pytest.param("exact", "float32", "tail-topk", id="fp32", marks=pytest.mark.exhaustive),
        pytest.param("coarse", "bfloat16", "exact-reverse-kl", id="bf16"),
    ],
)
def test_right_teachers_pass_beside_other_work_and_replaced_weights_are_found(
    served: str, dtype: Dtype, objective: str, pools: dict[str, TeacherPool], tiny_teacher: Path, tmp_path: Path
) -> None:
    config = make_run(tiny_teacher, dtype, objective)
    request, folder = audit_request(config, "main"), tmp_path / "run"
    audit = ScoreAudit(config, {"main": pools[served]}, folder)
    audit.take_rows([make_handle(0, [40, 31, 25, 50, 25])])
    for step in (0, 50, 100):
        run_audit(audit, pools[served], step, request)
    with other_weights(tiny_teacher, tmp_path):
        replaced = start("replaced", tiny_teacher, dtype, num_replicas=1)
        try:
            replaced.wait_until_ready()
            audit = ScoreAudit(config, {"main": replaced}, folder)
            audit.begin(100)
            said = "replica teacher-replaced-0: its answers .* not the teacher .* are others now"
            with pytest.raises(ScoreError, match=said):
                audit.finish()
        finally:
            replaced.shutdown()


@contextmanager
def other_weights(model: Path, beside: Path) -> Iterator[None]:
    """Put another file in the place of a model's weights; those who mapped the first keep it."""
    weights, kept = model / "model.safetensors", beside / "kept.safetensors"
    other = write_tiny_qwen3(beside / "other", seed=1) / weights.name
    kept.hardlink_to(weights)
    other.replace(weights)
    try:
        yield
    finally:
        kept.replace(weights)
