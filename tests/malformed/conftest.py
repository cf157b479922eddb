"""A tiny model that each test may copy and damage."""

from pathlib import Path

import pytest

from tests.tiny_qwen3 import write_tiny_qwen3


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("model") / "tiny")
