"""Random episodes on a real rollout actor against transformers: further rows and all."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cluster.actors.cluster import PoolTimeouts
from cluster.config.sections import EnvironmentConfig, StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.requests import SamplingSettings
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.rollout_workers.deployment import RolloutDeployment, make_prompts
from tests.tiny_qwen3 import CONTEXT_TOKENS, expected_logprobs, load, write_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_EPISODES = 24


@pytest.fixture(scope="module")
def rollouts(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutDeployment]:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("student"))
    settings = RolloutActorSettings(
        student=StudentConfig(str(folder)),
        engine=EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1),
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport=None,
        environment=EnvironmentConfig(
            "tests.rollout_workers.test_episodes:RandomAnswers", max_observation_tokens=60, max_turn_tokens=6
        ),
    )
    pool = RolloutPool(settings, [{"num_cpus": 1}], PoolTimeouts(start_seconds=500, call_seconds=120))
    pool.wait_until_ready()
    prompts = make_prompts()
    pool.set_prompts(prompts)
    yield RolloutDeployment(pool, prompts, load(folder))
    pool.shutdown()


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
