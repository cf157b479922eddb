"""Which optimizer the ZeRO engine is given; the engine itself runs in tests/learner/test_group.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.stages import LearnerConfig
from learner.engines.base import PausableAdamW
from learner.engines.zero import make_optimizer, tools_on_path, zero_settings


def test_parameters_that_are_offloaded_alone_leave_the_optimizer_on_the_gpu() -> None:
    student: Any = torch.nn.Linear(2, 2)
    config = LearnerConfig(zero_stage=3, offload_parameters="cpu")
    # DeepSpeed keeps the masters on the GPU then, and its AdamW for host memory refuses them at the first step.
    assert isinstance(make_optimizer(student, config), PausableAdamW)


def test_ninja_is_found_where_the_environment_was_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g++").symlink_to("/usr/bin/g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("ninja") is None
    tools_on_path()
    assert shutil.which("ninja") is not None
    assert shutil.which("g++") == str(tmp_path / "g++")  # what was there comes first


def test_entries_of_the_run_file_stand_beside_our_own() -> None:
    ours = zero_settings(LearnerConfig(offload_optimizer="cpu"), world_size=2)
    further = {"wall_clock_breakdown": True, "zero_optimization": {"offload_optimizer": {"pin_memory": True}}}
    both = zero_settings(LearnerConfig(offload_optimizer="cpu", deepspeed=further), world_size=2)
    assert both.pop("wall_clock_breakdown") is True
    assert both.pop("zero_optimization") == {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert both == {name: value for name, value in ours.items() if name != "zero_optimization"}
