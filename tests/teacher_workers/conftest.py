"""One real teacher for all tests here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.actors import PoolTimeouts
from cluster.contracts.config import EngineConfig, TeacherConfig
from teacher_workers.pool import TeacherPool
from tests.tiny_qwen3 import CONTEXT_TOKENS, TEACHER_TOP_K, write_tiny_qwen3


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture(scope="session")
def teacher_pool(ray_cluster: None, teacher_folder: Path) -> Iterator[TeacherPool]:
    engine = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1)
    teacher = TeacherConfig(model=str(teacher_folder), top_k=TEACHER_TOP_K, engine=engine)
    timeouts = PoolTimeouts(start_seconds=500, call_seconds=120)
    pool = TeacherPool("even", teacher, CONTEXT_TOKENS, [{"num_cpus": 1}] * 2, timeouts)
    pool.wait_until_ready()
    yield pool
    pool.shutdown()
