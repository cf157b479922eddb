"""Code that comes with a model runs only where the run file asks for it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config.sections import StudentConfig
from cluster.config.stages import LearnerConfig
from cluster.contracts.errors import PreceptorError
from cluster.demo import EMBEDDED
from cluster.models.lm_head import load_lm_head
from cluster.models.model_files import load_model_config, load_tokenizer
from learner.model.student import load_student

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

Path({marker!r}).touch()


class OwnConfig(Qwen3Config):
    model_type = "own"


class OwnModel(Qwen3ForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the model's code makes when it runs."""
    return tmp_path / "the code ran"


@pytest.fixture
def model(tmp_path: Path, marker: Path) -> str:
    """The embedded student, which says that its classes are in a file of its own."""
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED / "student", folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    autos = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change(folder / "config.json", model_type="own", auto_map=autos)
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
    )
    return str(folder)


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def student(model: str, trust: bool) -> object:
    return load_student(StudentConfig(model, trust), LearnerConfig(dtype="float32"))


def head(model: str, trust: bool) -> object:
    return load_lm_head(model, trust, "float32")


@pytest.mark.parametrize("load", [load_model_config, load_tokenizer, student, head])
def test_a_models_own_code_does_not_run_unless_it_is_trusted(
    load: Callable[[str, bool], object], model: str, marker: Path
) -> None:
    try:
        load(model, False)
    except PreceptorError as error:
        assert "trust_remote_code = true" in str(error)  # noqa: PT017, loading without the code is as good as refusing
    assert not marker.exists()


def run(script: str, tmp_path: Path) -> "subprocess.CompletedProcess[str]":
    """Run a script in a process that keeps copies of trusted code below `tmp_path`."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path.cwd()
    )


@pytest.mark.parametrize("loader", ["load_model_config", "load_tokenizer"])
def test_it_runs_where_it_is_trusted(loader: str, model: str, marker: Path, tmp_path: Path) -> None:
    found = run(f"from cluster.models.model_files import {loader}; {loader}({model!r}, True)", tmp_path)
    assert found.returncode == 0, found.stderr
    assert marker.exists()


BUILD_ENGINE = """
from cluster.config.stages import EngineConfig
from cluster.contracts.errors import ModelError
from cluster.vllm.engine import EngineRole, build_engine

try:
    build_engine({model!r}, False, EngineConfig(dtype="float32"), EngineRole(64, prefix_caching=False, tokenizer=True))
except ModelError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_no_engine_starts_on_code_that_is_not_trusted(model: str, marker: Path, tmp_path: Path) -> None:
    found = run(BUILD_ENGINE.format(model=model), tmp_path)
    assert "refused: vLLM cannot serve" in found.stdout, found.stderr
    assert "trust_remote_code" in found.stdout
    assert not marker.exists()
