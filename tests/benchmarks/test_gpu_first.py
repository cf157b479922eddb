"""The first checks of a new GPU, as far as a CPU can run them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def first(*parts: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_first", *parts]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)


def lines_of(*parts: str) -> list[str]:
    """Return what the parts say, and nothing of it wrong."""
    done = first(*parts)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith("[")]  # DeepSpeed logs there
    assert {line.split(":")[0] for line in lines} == set(parts)
    return lines


@pytest.mark.slow
def test_what_a_cpu_can_check_is_right() -> None:
    assert "ipc: needs a GPU, and this machine has none" in lines_of("ipc", "heads", "gradients")


@pytest.mark.slow
@pytest.mark.exhaustive  # what ZeRO computes: tests/learner/test_group.py
def test_zero_trains_as_plain_torch_does() -> None:
    assert [line.split(":")[1] for line in lines_of("zero")] == [" stage 0", " stage 2", " stage 3"]


def test_the_parts_load_neither_vllm_nor_ray() -> None:
    script = "import sys, benchmarks.gpu_first; print({'vllm', 'ray', 'deepspeed'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_an_unknown_part_is_refused() -> None:
    assert first("gpus").returncode == 2
