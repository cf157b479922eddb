"""The pool's own work, on actors without engines."""

from collections.abc import Iterator

import pytest

from cluster.actors import PoolTimeouts
from cluster.contracts.config import EngineConfig, StudentConfig
from cluster.contracts.interfaces import BatchHandle, RolloutRequest, SamplingSettings
from rollout_workers.actor import RolloutActorSettings
from rollout_workers.pool import RolloutPool
from tests.rollout_workers.deployment import make_prompts
from tests.rollout_workers.stub_actor import StubRolloutActor

SETTINGS = RolloutActorSettings(StudentConfig("none"), EngineConfig(), 512, 4, None)
SAMPLING = SamplingSettings(64, 1.0)


@pytest.fixture
def pool(ray_cluster: None) -> Iterator[RolloutPool]:
    pool = RolloutPool(SETTINGS, [{"num_cpus": 0}], PoolTimeouts(60, 60), "stub", actor=StubRolloutActor)
    pool.wait_until_ready()
    yield pool
    pool.shutdown()


def ask(pool: RolloutPool, lengths: dict[int, int]) -> list[BatchHandle]:
    """Ask for one completion of each prompt, of so many tokens."""
    requests = [RolloutRequest(prompt_id, prompt_id, 0, seed=tokens) for prompt_id, tokens in lengths.items()]
    return list(pool.generate(requests, SAMPLING, "exact"))


def prompts_of(handles: list[BatchHandle]) -> list[int]:
    return [prompt_id for handle in handles for prompt_id in handle.prompt_ids]


def test_prompts_that_were_long_are_asked_first_the_next_time(pool: RolloutPool) -> None:
    lengths = {0: 5, 1: 40, 2: 20}
    assert prompts_of(ask(pool, lengths)) == [0, 1, 2]
    assert prompts_of(ask(pool, lengths)) == [1, 2, 0]


def test_new_prompts_have_no_past(pool: RolloutPool) -> None:
    lengths = {0: 5, 1: 40, 2: 20}
    ask(pool, lengths)
    pool.set_prompts(make_prompts())
    assert prompts_of(ask(pool, lengths)) == [0, 1, 2]


def test_a_rollout_that_is_waited_for_goes_before_every_step(pool: RolloutPool) -> None:
    assert all(handle.rollout < 0 for _ in range(2) for handle in ask(pool, {0: 1}))
