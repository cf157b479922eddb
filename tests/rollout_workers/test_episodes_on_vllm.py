"""Random episodes on a real rollout actor against transformers: further rows and all."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cluster.config.sections import EnvironmentConfig
from cluster.contracts.requests import SamplingSettings
from tests.rollout_workers.deployment import RolloutDeployment, deployed
from tests.tiny_qwen3 import expected_logprobs, write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_EPISODES = 24


@pytest.fixture(scope="module")
def rollouts(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutDeployment]:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("student"))
    environment = EnvironmentConfig(
        "tests.rollout_workers.test_episodes:RandomAnswers", max_observation_tokens=60, max_turn_tokens=6
    )
    with deployed(folder, transport=None, environment=environment) as deployment:
        yield deployment


def test_a_whole_row_of_turns_has_the_probabilities_under_which_it_was_sampled(rollouts: RolloutDeployment) -> None:
    requests = rollouts.requests([index % 8 for index in range(NUM_EPISODES)])
    rows = rollouts.generate(requests, SamplingSettings(60, 1.0))
    assert {row["episode_id"] for row in rows} == {request.trajectory_id for request in requests}
    assert len(rows) > NUM_EPISODES  # some prefixes broke
    assert max(row["turn"] for row in rows) > 0
    for row in rows:
        sampled = np.flatnonzero(row["loss_mask"])
        expected = expected_logprobs(rollouts.student, row["token_ids"].tolist())[sampled - 1]
        of_tokens = expected.gather(1, torch.from_numpy(row["token_ids"][sampled]).long()[:, None])[:, 0]
        np.testing.assert_allclose(row["rollout_logprobs"], of_tokens, rtol=0, atol=1e-4)
    again = rollouts.generate(requests, SamplingSettings(60, 1.0))
    assert [row["token_ids"].tolist() for row in rows] == [row["token_ids"].tolist() for row in again]
