"""Which optimizer the ZeRO engine is given; the engine itself runs in tests/learner/test_group.py."""

from typing import Any

import torch

from cluster.config.stages import LearnerConfig
from learner.engines.base import PausableAdamW
from learner.engines.zero import make_optimizer


def test_parameters_that_are_offloaded_alone_leave_the_optimizer_on_the_gpu() -> None:
    student: Any = torch.nn.Linear(2, 2)
    config = LearnerConfig(zero_stage=3, offload_parameters="cpu")
    # DeepSpeed keeps the masters on the GPU then, and its AdamW for host memory refuses them at the first step.
    assert isinstance(make_optimizer(student, config), PausableAdamW)
