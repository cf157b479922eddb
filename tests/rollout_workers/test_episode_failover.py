"""Rollout workers that die in the middle of episodes lose and repeat nothing; on a stub engine."""

from pathlib import Path
from typing import Any

import pytest

from cluster.actors.cluster import RayCluster
from cluster.contracts.requests import RolloutRequest
from rollout_workers.pool import ROLLOUT_ACTOR, RolloutPool
from tests.rollout_workers.deployment import NUM_PROMPTS, rows_of
from tests.rollout_workers.test_episodes import SAMPLING
from tests.rollout_workers.test_failover import start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_EPISODES = 200
EPISODES = RayCluster({ROLLOUT_ACTOR: "tests.rollout_workers.episode_actor:EpisodeActor"})


def rows(pool: RolloutPool) -> tuple[list[dict[str, Any]], list[int]]:
    """Return all rows in order, and the episodes that each batch answers."""
    requests = tuple(RolloutRequest(number, number % NUM_PROMPTS, 0, 100 + number) for number in range(NUM_EPISODES))
    handles = list(pool.generate(requests, SAMPLING))
    found = [row for handle in handles for row in rows_of(handle.reference)]
    answered = [episode for handle in handles for episode in dict.fromkeys(handle.episodes)]
    return sorted(found, key=lambda row: (row["episode_id"], row["turn"])), answered


def test_episodes_that_a_dead_worker_had_begun_are_done_again_as_they_were(tmp_path: Path, ray_cluster: None) -> None:
    with start(tmp_path, 2, cluster=EPISODES) as pool:
        calm, _ = rows(pool)
        orders = [tmp_path / "writer-0", tmp_path / "writer-1"]
        for order in orders:
            order.touch()
        disturbed, answered = rows(pool)
        assert not any(order.exists() for order in orders)  # both died
    assert sorted(answered) == list(range(NUM_EPISODES))
    assert len(calm) == len(disturbed) > NUM_EPISODES
    for one, other in zip(calm, disturbed, strict=True):
        assert {name: str(value) for name, value in one.items()} == {name: str(value) for name, value in other.items()}
