"""A real vLLM rollout actor whose running requests keep their caches when the weights change."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.contracts.requests import SamplingSettings
from tests.rollout_workers.deployment import (
    LONG_PROMPT,
    NUM_PROMPTS,
    RolloutDeployment,
    deployed,
    version_of_each_token,
)
from tests.rollout_workers.test_rollouts_on_vllm import gaps, largest_gap

# An engine of its own; `tests/cluster/vllm/test_keep_cache.py` holds the scheduler alone in `make test`.
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(600)]


@pytest.fixture
def keeping(ray_cluster: None, tiny_student: Path) -> Iterator[RolloutDeployment]:
    with deployed(tiny_student, "keeping", keeps_cache=True) as deployment:
        yield deployment


def test_tokens_after_an_update_come_from_new_weights_and_kept_caches_and_new_prompts_from_new_weights_alone(
    keeping: RolloutDeployment,
) -> None:
    # The long prompt's blocks are cached when the weights change.
    asked = [LONG_PROMPT, *range(NUM_PROMPTS)] * 6
    weights, rows = keeping.generate_across_updates(asked, SamplingSettings(400, 1.0))
    by_row = [version_of_each_token(row) for row in rows]
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
