"""A rollout engine that waits for no NCCL group runs on the learner's weights, and says so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config.stages import WeightSyncConfig
from cluster.contracts.requests import SamplingSettings
from learner.weight_sync.gpu_sender import VllmSender
from tests.learner.weight_sync.fake_gpus import FakeGroup, nccl
from tests.rollout_workers.deployment import FrozenEngine, RolloutDeployment, deployed
from tests.tiny_qwen3 import expected_logprobs

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

SAME = 1e-5  # nats between vLLM and transformers in float32
SECONDS = 120.0


@pytest.fixture
def newcomer(ray_cluster: None, tiny_student: Path) -> Iterator[RolloutDeployment]:
    """Start a rollout actor of a run whose weights travel by NCCL, which a CPU has not."""
    with deployed(tiny_student, "newcomers", "nccl") as deployment:
        yield deployment


def test_a_newcomer_writes_with_the_weights_that_it_was_brought(newcomer: RolloutDeployment) -> None:
    groups: list[FakeGroup] = []
    engine: Any = FrozenEngine(newcomer.student)
    sender = VllmSender(engine, WeightSyncConfig(bucket_bytes=1 << 15), "float32", SECONDS, nccl(groups))
    sender._connected = sender._known = ["a worker that is in a group"]  # type: ignore[list-item]
    for version in (1, 2):
        newcomer.change_weights()
        sender._known = sender._known[:1]  # else it would join the second time
        report = sender.publish(newcomer.pool.actors, version)
        assert report.num_bytes == 4 * sum(value.numel() for value in newcomer.student.parameters())
        rows = newcomer.generate(newcomer.requests([0, 1, 2, 3]), SamplingSettings(16, 1.0))
        for row in rows:
            assert row["max_policy_version"] == version
            expected = expected_logprobs(newcomer.student, row["token_ids"].tolist())
            written = torch.from_numpy(row["loss_mask"]).nonzero().squeeze(-1)
            said = expected[written - 1, torch.from_numpy(row["token_ids"])[written].long()]
            assert (said - torch.from_numpy(row["rollout_logprobs"])).abs().max() < SAME
    assert groups == []  # nobody met anybody
