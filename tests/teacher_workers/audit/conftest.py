"""Two teachers of one shape, and an actor that plays replicas of them."""

from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.config.run_config import Config
from tests.builders import make_config
from tests.teacher_workers.audited_actors import Stage
from tests.tiny_qwen3 import write_tiny_qwen3


@pytest.fixture(scope="module")
def stage(ray_cluster: None) -> Any:
    return ray.remote(Stage).options(num_cpus=0).remote()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_tiny_qwen3(folder / name, seed) for seed, name in enumerate(("first", "second"))}


@pytest.fixture
def config(models: dict[str, Path]) -> Config:
    return make_config(f"teachers.main.model={models['first']}", "objective=thinking-machines")
