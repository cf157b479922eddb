"""A real vLLM rollout actor whose running requests keep their caches when the weights change."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.actors.cluster import PoolTimeouts
from cluster.config.sections import StudentConfig
from cluster.config.stages import EngineConfig
from cluster.contracts.requests import SamplingSettings
from rollout_workers.pool import RolloutActorSettings, RolloutPool
from tests.rollout_workers.deployment import LONG_PROMPT, NUM_PROMPTS, RolloutDeployment, make_prompts
from tests.rollout_workers.test_rollouts_on_vllm import (
    MAX_TRIES,
    gaps,
    generate_across_two_updates,
    largest_gap,
    version_of_each_token,
)
from tests.tiny_qwen3 import CONTEXT_TOKENS, load

# An engine of its own; `tests/cluster/vllm/test_keep_cache.py` holds the scheduler alone in `make test`.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]


@pytest.fixture
def keeping(ray_cluster: None, tiny_student: Path) -> Iterator[RolloutDeployment]:
    settings = RolloutActorSettings(
        student=StudentConfig(str(tiny_student)),
        engine=EngineConfig(dtype="float32", kv_cache_gib=0.1, cpu_threads=1),
        max_model_len=CONTEXT_TOKENS,
        rows_per_batch=4,
        weight_transport="object_store",
        keeps_cache=True,
    )
    pool = RolloutPool(settings, [{"num_cpus": 1}], PoolTimeouts(start_seconds=500, call_seconds=120), "keeping")
    pool.wait_until_ready()
    prompts = make_prompts()
    pool.set_prompts(prompts)
    yield RolloutDeployment(pool, prompts, load(tiny_student))
    pool.shutdown()


def test_tokens_after_an_update_come_from_new_weights_and_kept_caches_and_new_prompts_from_new_weights_alone(
    keeping: RolloutDeployment,
) -> None:
    for _ in range(MAX_TRIES):
        keeping.generate(keeping.requests([LONG_PROMPT]), SamplingSettings(1, 1.0))  # now its blocks are cached
        weights, rows = generate_across_two_updates(keeping)
        by_row = [version_of_each_token(row) for row in rows]
        changed = [versions[0] != versions[-1] for versions in by_row]
        if sum(changed) > 10:
            break
    assert sum(changed) > 10
    for version, kept in weights.items():
        keeping.student.load_state_dict(kept)
        first, later = [np.zeros(1)], []
        for gap, versions in zip([gaps(keeping, row) for row in rows], by_row, strict=True):
            (first if versions[0] == version else later).append(gap[versions == version])
        # What a row's first weights sampled is theirs but for rounding; what came later saw older keys and values.
        assert np.concatenate(first).max() < 1e-4
        if len(values := np.concatenate([*later, np.zeros(0)])):
            assert np.median(values) > 1e-3
    asked = [LONG_PROMPT, *range(NUM_PROMPTS)]
    rows = keeping.generate(keeping.requests(asked), SamplingSettings(16, 1.0))
    assert max(largest_gap(keeping, row) for row in rows) < 1e-5
    assert {row["min_policy_version"] for row in rows} == {keeping.policy_version}
