"""The pool's own work, on actors without engines."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.actors.cluster import PoolTimeouts, RayCluster
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.batches import BatchHandle
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import ROLLOUT_ACTOR, RolloutActorSettings, RolloutPool
from tests.leak_check import wait_until
from tests.rollout_workers.deployment import make_prompts

SETTINGS = RolloutActorSettings(StudentConfig("none"), EngineConfig(), 512, 4, None)
STUBS = RayCluster({ROLLOUT_ACTOR: "tests.rollout_workers.stub_actor:StubRolloutActor"})
SAMPLING = SamplingSettings(64, 1.0)


@pytest.fixture
def pool(ray_cluster: None) -> Iterator[RolloutPool]:
    pool = RolloutPool(SETTINGS, [{"num_cpus": 0}], PoolTimeouts(60, 60), "stub", STUBS)
    pool.wait_until_ready()
    yield pool
    pool.shutdown()


def ask(pool: RolloutPool, lengths: dict[int, int]) -> list[BatchHandle]:
    """Ask for one completion of each prompt, of so many tokens."""
    requests = [RolloutRequest(prompt_id, prompt_id, 0, seed=tokens) for prompt_id, tokens in lengths.items()]
    return list(pool.generate(requests, SAMPLING))


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


def test_a_batch_says_who_wrote_it_and_how_much(pool: RolloutPool) -> None:
    spans = [span for handle in ask(pool, {0: 5, 1: 40}) for span in handle.spans]
    assert {(span.pool, span.worker, span.stage) for span in spans} == {("stub", "stub-0", "generate")}
    assert (sum(span.num_rows for span in spans), sum(span.num_tokens for span in spans)) == (2, 45)
    assert all(span.seconds > 0 for span in spans)
    assert spans[0].ended <= spans[1].began  # it is asked for the second batch when the first is back


def test_the_pool_knows_who_serves_and_what_is_owed(pool: RolloutPool) -> None:
    requests = tuple(RolloutRequest(prompt_id, prompt_id, 0, seed=5) for prompt_id in range(3))
    pool.submit(0, requests, SAMPLING)
    owing = pool.state()
    assert (owing.name, owing.serving, owing.num_wanted, owing.num_restarts) == ("stub", ["stub-0"], 1, 0)
    assert owing.num_owed == 3
    while pool.late():
        pool.collect(STUBS.wait_for_any(pool.maintain, 60, pool.late))
    assert pool.state().num_owed == 0


def test_engines_rest_when_all_of_a_step_is_written_and_not_after_an_evaluation(ray_cluster: None) -> None:
    pool = RolloutPool(replace(SETTINGS, rests=True), [{"num_cpus": 0}], PoolTimeouts(60, 60), "resting", STUBS)
    pool.wait_until_ready()
    ask(pool, {0: 5})
    for step in (3, 4):
        for first in (0, 2):  # two submissions; the engines rest after the last of them
            requests = tuple(RolloutRequest(prompt_id, prompt_id, 0, seed=5) for prompt_id in (first, first + 1))
            pool.submit(step, requests, SAMPLING)
        while pool.late():
            pool.collect(STUBS.wait_for_any(pool.maintain, 60, pool.late))
    [actor] = pool.actors

    def rests() -> list[int]:
        return STUBS.get(actor.rests.remote(), 60, "the stub")

    assert wait_until(lambda: len(rests()) == 2, 30)  # nobody waits for an engine to rest
    assert sorted(rests()) == [3, 4]
    pool.shutdown()
