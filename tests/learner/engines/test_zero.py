"""How the ZeRO engine starts, in processes of their own; what it computes is held against plain torch in test_group."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STARTS_SHARDED = """
import sys, torch
from cluster.config.run_config import StudentConfig
from cluster.config.stages import LearnerConfig
from learner.model.student import load_student
from learner.engines.zero import ZeroEngine

config = LearnerConfig(zero_stage=3, dtype="float32")
student = load_student(StudentConfig(sys.argv[1]), config)

def refuse(*where):
    raise SystemExit("the whole student was brought to one device")

student.to = refuse
engine = ZeroEngine(student, config, 0, 1, "file://" + sys.argv[2])
assert not any(parameter.numel() for parameter in student.parameters()), "not sharded"
with engine.full_parameters(["model.norm.weight"]) as found:
    assert torch.equal(found["model.norm.weight"], torch.ones(64))
print("sharded")
"""
LOOKS_FOR_NO_COMPILER = """
import deepspeed
from learner.engines.zero import _skip_shared_memory_op

_skip_shared_memory_op()
assert deepspeed.accelerator.get_accelerator().device_name() == "cuda"
assert "__compatible_ops__" not in vars(deepspeed.ops)
print("not looked")
"""


def run(program: str, *arguments: str, **variables: str) -> str:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **variables}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_stage_3_never_brings_the_whole_student_to_a_device(student_folder: Path, tmp_path: Path) -> None:
    assert run(STARTS_SHARDED, str(student_folder), str(tmp_path / "store"), DS_ACCELERATOR="cpu") == "sharded"


def test_on_a_gpu_deepspeed_tries_no_compilers() -> None:
    assert run(LOOKS_FOR_NO_COMPILER, DS_ACCELERATOR="cuda") == "not looked"
