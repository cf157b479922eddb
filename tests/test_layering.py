"""Imports point down, heavy libraries enter by their own doors, and the contracts load none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture import PACKAGES, ROOT, broken_layers
from tests.interpreter import python

DOORS = {
    "vllm": {
        "cluster.vllm.batch_requests",
        "cluster.vllm.cpu_norms",
        "cluster.vllm.engine",
        "cluster.vllm.keep_cache",
        "cluster.vllm.layer_states",
        "cluster.vllm.token_scoring",
        "cluster.vllm.compat",
        "rollout_workers.candidates.vllm_processor",
        "rollout_workers.environments.tool_calls",
        "cluster.vllm.weight_sync.loading",
        "cluster.vllm.weight_sync.nccl_and_ipc",
        "cluster.vllm.weight_sync.object_store",
        "cluster.vllm.weight_sync.updates",
        "rollout_workers.weight_sync.worker_extension",
        "cluster.vllm.stop_class_processor",
        "rollout_workers.vllm_engine",
        "cluster.vllm.generation",
        "teacher_workers.backends.vllm",
    },
    "deepspeed": {"learner.engines.zero"},
    "triton": {"learner.loss.kernels.triton_kernels", "learner.loss.kernels.triton_launch"},
}
ELSEWHERE = {"rollout_workers.harness.verifiers_v1"}  # imported by the Python that has the package `verifiers`
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed")

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_imports_point_down() -> None:
    assert broken_layers() == []


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_heavy_libraries_enter_by_their_doors(module: str) -> None:
    for target in imports(SOURCES[module]):
        library = target.split(".")[0]
        assert module in DOORS.get(library, {module}), f"{module} may not import {library}"


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if name.endswith("__init__")))
def test_package_files_are_empty(module: str) -> None:
    assert SOURCES[module].read_text() == ""


def loaded_by(statement: str, interpreter: str = sys.executable) -> set[str]:
    script = f"import sys; {statement}; print(*sorted(sys.modules))"
    output = subprocess.run([interpreter, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(output.stdout.split())


def test_the_contracts_load_no_heavy_library() -> None:
    names = (
        "config.run_config",
        "contracts.batches",
        "contracts.errors",
        "contracts.trajectory",
        "weight_sync.manifest",
        "weight_sync.transports",
    )
    loaded = loaded_by("; ".join(f"import cluster.{name}" for name in names))
    assert not loaded & set(HEAVY)


def test_the_command_line_loads_no_heavy_library_before_it_needs_one() -> None:
    assert not loaded_by("import cluster.cli") & set(HEAVY)


def test_every_module_can_be_imported_without_a_gpu(preloaded: None) -> None:
    imported = (name for name in SOURCES if not name.endswith("__main__") and name not in ELSEWHERE)
    modules = [name.removesuffix(".__init__") for name in imported]
    loaded_by("; ".join(f"import {name}" for name in modules), python())
