"""Which optimizer the ZeRO engine is given; the engine itself runs in tests/learner/test_group.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.stages import LearnerConfig
from cluster.placement.memory import bucket_values
from learner.engines.base import PausableAdamW
from learner.engines.zero import make_optimizer, tools_on_path, zero_settings


def test_parameters_that_are_offloaded_alone_leave_the_optimizer_on_the_gpu() -> None:
    student: Any = torch.nn.Linear(2, 2)
    config = LearnerConfig(zero_stage=3, offload_parameters="cpu")
    # DeepSpeed keeps the masters on the GPU then, and its AdamW for host memory refuses them at the first step.
    assert isinstance(make_optimizer(student, config), PausableAdamW)


@pytest.mark.parametrize(
    ("num_values", "gib", "expected"),
    [
        (8_000_000_000, 80, 500_000_000),
        (8_000_000_000, 24, 100_000_000),
        (30_000_000, 24, 30_000_000),  # no bucket is larger than the model
        (600_000_000, None, 500_000_000),
    ],
)
def test_buckets_follow_the_model_and_the_gpu(num_values: int, gib: int | None, expected: int) -> None:
    bucket = bucket_values(num_values, None if gib is None else gib << 30)
    assert bucket == expected
    zero = zero_settings(LearnerConfig(), 2, bucket)["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["allgather_bucket_size"]) == (expected, expected)
    own = {"zero_optimization": {"reduce_bucket_size": 7}}
    assert zero_settings(LearnerConfig(deepspeed=own), 2, bucket)["zero_optimization"]["reduce_bucket_size"] == 7


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
    assert both.pop("zero_optimization") == ours["zero_optimization"] | {
        "offload_optimizer": {"device": "cpu", "pin_memory": True}
    }
    assert both == {name: value for name, value in ours.items() if name != "zero_optimization"}
