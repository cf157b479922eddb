"""One real rollout actor that runs two requests at a time: who comes first, and what is looked for on the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.actors.cluster import RAY, PoolTimeouts
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.errors import RolloutError
from cluster.contracts.requests import RolloutRequest, SamplingSettings
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.rollout_workers.deployment import make_prompts, rows_of
from tests.tiny_qwen3 import CONTEXT_TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engine to start

LONGEST_LOOP = 6


@pytest.fixture(scope="module")
def pool(ray_cluster: None, tiny_student: Path) -> Iterator[RolloutPool]:
    engine = EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1, max_concurrent_sequences=2)
    settings = RolloutActorSettings(StudentConfig(str(tiny_student)), engine, CONTEXT_TOKENS, 1, None)
    pool = RolloutPool(settings, [{"num_cpus": 1}], PoolTimeouts(start_seconds=500, call_seconds=120), "narrow")
    pool.wait_until_ready()
    pool.set_prompts(make_prompts())
    yield pool
    pool.shutdown()


def requests(count: int) -> list[RolloutRequest]:
    return [RolloutRequest(index, index % 8, 0, seed=index) for index in range(count)]


def completions(pool: RolloutPool, sampling: SamplingSettings) -> list[tuple[list[int], str]]:
    """Ask every short prompt once; return tokens and finish reason by prompt."""
    handles = pool.generate(requests(8), sampling)
    rows: list[dict[str, Any]] = [row for handle in handles for row in rows_of(handle.reference)]
    rows.sort(key=lambda row: row["prompt_id"])
    return [(row["token_ids"][row["loss_mask"] == 1].tolist(), row["finish_reason"]) for row in rows]


def loops(tokens: list[int]) -> bool:
    """Tell whether four times the same passage of 4, 5 or 6 tokens is the end: the upper half of LONGEST_LOOP."""
    return any(
        len(tokens) >= 4 * size and (np.array(tokens[-4 * size :]).reshape(4, size) == tokens[-size:]).all()
        for size in (4, 5, 6)
    )


def test_requests_of_an_earlier_step_overtake_those_of_a_later_one_that_wait(pool: RolloutPool) -> None:
    sampling = SamplingSettings(64, 1.0)
    for step, count in ((8, 12), (7, 6)):
        pool.submit(step, tuple(requests(count)), sampling)
    finished: list[int] = []
    while len(finished) < 18:
        ready = RAY.wait_for_any(pool.maintain, 120, pool.late)
        finished += [handle.rollout for handle in pool.collect(ready) for _ in handle.trajectory_ids]
    assert sorted(finished) == [7] * 6 + [8] * 12
    assert finished[-5:] == [8] * 5  # in the order of arrival the last would be of step 7


def test_a_completion_ends_where_it_has_looped_and_nowhere_else(pool: RolloutPool) -> None:
    greedy = SamplingSettings(200, temperature=0.0)
    free = completions(pool, greedy)
    stopped = completions(pool, SamplingSettings(200, temperature=0.0, stop_repetition=LONGEST_LOOP))
    reasons = {reason for _, reason in stopped}
    assert "repetition" in reasons
    for (whole, _), (tokens, reason) in zip(free, stopped, strict=True):
        assert tokens == whole[: len(tokens)]
        assert [length for length in range(len(whole)) if loops(whole[:length])][:1] == (
            [len(tokens)] if reason == "repetition" else []
        )


def test_an_engine_without_draws_refuses_them(pool: RolloutPool) -> None:
    with pytest.raises(RolloutError, match="wants sampled candidates, but its engine was started without"):
        list(pool.generate(requests(1), SamplingSettings(4, 1.0, num_candidates=2, candidates="sampled")))


def test_what_vllm_refuses_to_sample_is_a_rollout_error(pool: RolloutPool) -> None:
    with pytest.raises(RolloutError, match=r"temperature must be in \[0, 2\]"):
        list(pool.generate(requests(1), SamplingSettings(4, temperature=2.5)))
