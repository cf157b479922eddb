"""The real vLLM teachers that the tests here share: starting an engine takes longer than all that they ask of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.actors.cluster import PoolTimeouts
from cluster.config.stages import Dtype, EngineConfig, StatesConfig, TeacherConfig
from teacher_workers.pool import TeacherPool, start_pool
from tests.tiny_qwen3 import CONTEXT_TOKENS, write_tiny_qwen3

ENGINE = {"kv_cache_gib": 0.1, "cpu_threads": 1}


def start(
    name: str,
    model: Path,
    dtype: Dtype,
    num_replicas: int,
    states: StatesConfig | None = None,
    tensor_parallel: int = 1,
) -> TeacherPool:
    engine = EngineConfig(dtype=dtype, tensor_parallel=tensor_parallel, **ENGINE)
    teacher = TeacherConfig(model=str(model), engine=engine, states=states)
    timeouts = PoolTimeouts(start_seconds=500, call_seconds=120)
    return start_pool(name, teacher, CONTEXT_TOKENS, [{"num_cpus": 1}] * num_replicas, timeouts)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the model that both pools serve."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="package")
def pools(ray_cluster: None, tiny_teacher: Path) -> Iterator[dict[str, TeacherPool]]:
    """Start the tiny teacher in float32 as `exact`, and twice in bfloat16 as `coarse`, which sends its two layers."""
    exact = start("exact", tiny_teacher, "float32", num_replicas=1)
    coarse = start(
        "coarse", tiny_teacher, "bfloat16", num_replicas=2, states=StatesConfig(layers=(1, 2), student_depth=2)
    )
    for pool in (exact, coarse):
        pool.wait_until_ready()
    yield {"exact": exact, "coarse": coarse}
    for pool in (exact, coarse):
        pool.shutdown()
