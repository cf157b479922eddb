"""The pools of real rollout actors that the tests here share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.actors.cluster import PoolTimeouts
from cluster.config.run_config import StudentConfig
from cluster.config.stages import EngineConfig
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.rollout_workers.deployment import RolloutDeployment, make_prompts
from tests.tiny_qwen3 import CONTEXT_TOKENS, load, write_tiny_qwen3


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def rollouts(ray_cluster: None, student_folder: Path) -> Iterator[RolloutDeployment]:
    engine = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1)
    settings = RolloutActorSettings(
        student=StudentConfig(str(student_folder)),
        engine=engine,
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport="object_store",
        draws=True,
    )
    pool = RolloutPool(settings, [{"num_cpus": 1}] * 2, PoolTimeouts(start_seconds=500, call_seconds=120))
    pool.wait_until_ready()
    prompts = make_prompts()
    pool.set_prompts(prompts)
    yield RolloutDeployment(pool, prompts, load(student_folder))
    pool.shutdown()
