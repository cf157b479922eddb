"""Real vLLM teachers pass their audits beside other work; other weights under the same name do not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.actors.cluster import RAY
from cluster.actors.object_store import STORE_ENVIRONMENT, add_environment, pack
from cluster.config.run_config import Config
from cluster.contracts.batches import BatchHandle
from cluster.contracts.errors import ScoreError
from cluster.contracts.requests import ScoreRequest
from cluster.contracts.trajectory import make_generated
from teacher_workers.audit.runner import ScoreAudit, audit_request
from teacher_workers.pool import TEACHER_ACTOR
from tests.builders import make_config, make_trajectory
from tests.teacher_workers.audited_actors import ActorsPool
from tests.tiny_qwen3 import CONTEXT_TOKENS, write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def make_run(model: Path, dtype: str, objective: str) -> Config:
    return make_config(
        f"teachers.main.model={model}",
        f"teachers.main.engine.dtype={dtype}",
        "teachers.main.engine.kv_cache_gib=0.1",
        "teachers.main.engine.cpu_threads=1",
        f"objective={objective}",
    )


@contextmanager
def serve(config: Config, *names: str) -> Iterator[dict[str, Any]]:
    """Start replicas of the run's teacher."""
    arguments = [(name, config.teachers["main"], CONTEXT_TOKENS) for name in names]
    options = [add_environment({"num_cpus": 1}, STORE_ENVIRONMENT)] * len(names)
    replicas = RAY.create(TEACHER_ACTOR, names, arguments, options)
    try:
        RAY.call_all(replicas, "start", timeout_seconds=500, waiting_for="teachers", names=names)
        yield dict(zip(names, replicas, strict=True))
    finally:
        RAY.shutdown(replicas)


def make_handle(seed: int, lengths: list[int]) -> BatchHandle:
    draw = np.random.default_rng(seed)
    rows = [make_trajectory(draw.integers(4, 112, 5), draw.integers(4, 112, length)) for length in lengths]
    wire, handle = pack(make_generated(rows), {})
    return replace(handle, reference=ray.put(wire))


def work(replicas: dict[str, Any], seed: int, request: ScoreRequest) -> list[Any]:
    """Let every replica score other batches, which its engine mixes with the probes."""
    handles = [make_handle(100 * seed + index, [20 + 13 * index, 90, 33]) for index in range(4)]
    return [
        replica.score.options(num_returns=2).remote(handle.reference, request)[1]
        for replica in replicas.values()
        for handle in handles
    ]


def run_audit(audit: ScoreAudit, replicas: dict[str, Any], step: int, request: ScoreRequest) -> None:
    """Audit in the middle of other work, and expect nothing."""
    before = work(replicas, 2 * step + 1, request)
    audit.begin(step)
    after = work(replicas, 2 * step + 2, request)
    assert audit.finish() == []
    ray.get([*before, *after], timeout=120)


@pytest.mark.parametrize(
    ("dtype", "objective"),
    [
        pytest.param("float32", "tail-topk", id="fp32", marks=pytest.mark.exhaustive),
        pytest.param("bfloat16", "exact-reverse-kl", id="bf16"),
    ],
)
def test_right_teachers_pass_beside_other_work_and_replaced_weights_are_found(
    dtype: str, objective: str, ray_cluster: None, tmp_path: Path
) -> None:
    model = write_tiny_qwen3(tmp_path / "model", seed=0)
    config = make_run(model, dtype, objective)
    request, folder = audit_request(config, "main"), tmp_path / "run"
    with serve(config, f"{dtype}-0", f"{dtype}-1") as replicas:
        audit = ScoreAudit(config, {"main": ActorsPool(replicas)}, folder)
        audit.take_rows([make_handle(0, [40, 31, 25, 50, 25])])
        for step in (0, 50, 100):
            run_audit(audit, replicas, step, request)
    write_tiny_qwen3(model, seed=1)
    with serve(config, f"{dtype}-2") as replicas:
        audit = ScoreAudit(config, {"main": ActorsPool(replicas)}, folder)
        audit.begin(100)
        with pytest.raises(ScoreError, match=f"replica {dtype}-2: its answers .* not the teacher .* are others now"):
            audit.finish()
