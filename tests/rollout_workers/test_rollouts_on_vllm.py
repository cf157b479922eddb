"""Two real vLLM rollout actors against transformers: draws, log-probabilities, weights that change under way."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import ray
import torch

from cluster.config.stages import WeightSyncConfig
from cluster.contracts.errors import WeightSyncError
from cluster.contracts.requests import SamplingSettings
from learner.weight_sync.object_store import ObjectStoreSender
from rollout_workers.batching import MAX_GROWTH
from tests.rollout_workers.deployment import (
    LONG_PROMPT,
    NUM_PROMPTS,
    FrozenEngine,
    RolloutDeployment,
    version_of_each_token,
)
from tests.tiny_qwen3 import HALT, expected_logprobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # the first test waits for the engines to start


def gaps(rollouts: RolloutDeployment, row: dict[str, Any], temperature: float = 1.0) -> np.ndarray:
    """Return [completion_tokens]: how far a row's log-probabilities are from the reference's at the same tokens."""
    token_ids = row["token_ids"].tolist()
    sampled = np.flatnonzero(row["loss_mask"])
    expected = expected_logprobs(rollouts.student, token_ids, temperature)[sampled - 1, row["token_ids"][sampled]]
    return np.asarray(np.abs(expected.numpy() - row["rollout_logprobs"]))


def largest_gap(rollouts: RolloutDeployment, row: dict[str, Any], temperature: float = 1.0) -> float:
    return float(gaps(rollouts, row, temperature).max())


def test_every_requested_trajectory_comes_exactly_once_and_batches_have_one_teacher(
    rollouts: RolloutDeployment,
) -> None:
    requests = rollouts.requests([index % NUM_PROMPTS for index in range(30)])
    handles = list(rollouts.pool.generate(requests, SamplingSettings(16, 1.0)))
    seen = Counter(trajectory_id for handle in handles for trajectory_id in handle.trajectory_ids)
    assert seen == Counter(request.trajectory_id for request in requests)
    prompt_of = {request.trajectory_id: request.prompt_id for request in requests}
    for handle in handles:
        assert {rollouts.prompts.teacher(prompt_of[row]) for row in handle.trajectory_ids} == {handle.teacher}
        assert len(handle.trajectory_ids) <= 4 * MAX_GROWTH
    assert sum(handle.metrics["rollout/tokens"].value for handle in handles) == sum(
        sum(handle.num_completion_tokens) for handle in handles
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_distribution_that_was_sampled(
    rollouts: RolloutDeployment, temperature: float
) -> None:
    rows = rollouts.generate(rollouts.requests([0, 1, 2, 3]), SamplingSettings(48, temperature))
    assert max(largest_gap(rollouts, row, temperature) for row in rows) < 1e-4


def test_top_p_renormalises_the_logprobs_over_the_tokens_it_keeps(rollouts: RolloutDeployment) -> None:
    [row] = rollouts.generate(rollouts.requests([0]), SamplingSettings(12, 1.0, top_p=0.5))
    sampled = np.flatnonzero(row["loss_mask"])
    probabilities = expected_logprobs(rollouts.student, row["token_ids"].tolist()).exp()[sampled - 1]
    for own, token, logprob in zip(probabilities, row["token_ids"][sampled], row["rollout_logprobs"], strict=True):
        best, _ = own.sort(descending=True)
        kept = best[: int((best.cumsum(0) < 0.5).sum()) + 1].sum()  # the fewest that reach one half
        assert logprob == pytest.approx(float((own[token] / kept).log()), abs=1e-4)


def test_the_same_seed_gives_the_same_draw_and_another_seed_another(rollouts: RolloutDeployment) -> None:
    sampling = SamplingSettings(24, 1.0)
    first, again, other = (rollouts.generate(rollouts.requests([5], seed=seed), sampling)[0] for seed in (7, 7, 8))
    assert first["token_ids"].tolist() == again["token_ids"].tolist() != other["token_ids"].tolist()


def test_many_seeded_prompts_beyond_one_step_of_the_engine_are_all_answered(rollouts: RolloutDeployment) -> None:
    requests = rollouts.requests([LONG_PROMPT] * 40)  # 12,000 prompt tokens, with 8,192 to a step
    assert len(rollouts.generate(requests, SamplingSettings(2, 1.0))) == 40


@pytest.mark.parametrize("stops", [{"stop": ("halt",)}, {"stop_token_ids": (HALT,)}], ids=["string", "id"])
def test_what_stops_a_completion_stays_in_it(rollouts: RolloutDeployment, stops: dict[str, Any]) -> None:
    rows = rollouts.generate(rollouts.requests([1] * 40), SamplingSettings(200, 1.0, **stops))
    halted = [row for row in rows if HALT in row["token_ids"][row["loss_mask"] == 1]]
    assert halted
    for row in halted:
        assert row["finish_reason"] == "stop"
        assert np.flatnonzero(row["token_ids"] == HALT).tolist() == [len(row["token_ids"]) - 1]


def test_new_weights_reach_running_requests_and_leave_no_stale_prefix(rollouts: RolloutDeployment) -> None:
    # The long prompt's blocks are cached when the weights change.
    weights, rows = rollouts.generate_across_updates([LONG_PROMPT, *range(NUM_PROMPTS)] * 8, SamplingSettings(400, 1.0))
    before, after = weights
    # Whole rows under the new weights are of requests that a busy machine had not begun before.
    versions = {(row["min_policy_version"], row["max_policy_version"]) for row in rows}
    assert versions <= {(before, before), (before, after), (after, after)}
    # Asked alone, the long prompt goes to the worker that had it before.
    asked = (rollouts.requests([LONG_PROMPT]), rollouts.requests([2, 3]))
    rows = [row for requests in asked for row in rollouts.generate(requests, SamplingSettings(32, 1.0))]
    assert max(largest_gap(rollouts, row) for row in rows) < 1e-5
    assert {(row["min_policy_version"], row["max_policy_version"]) for row in rows} == {(after, after)}


def test_a_row_says_which_of_its_tokens_each_version_wrote(rollouts: RolloutDeployment) -> None:
    # One version never reaches the workers.
    weights, rows = rollouts.generate_across_updates([*range(NUM_PROMPTS)] * 6, SamplingSettings(400, 1.0), (1, 3))
    by_token = np.concatenate([version_of_each_token(row) for row in rows])
    for version, kept in weights.items():
        rollouts.student.load_state_dict(kept)
        gap = np.concatenate([gaps(rollouts, row) for row in rows])
        assert gap[by_token == version].max() < 1e-4
        assert np.median(gap[by_token != version]) > 1e-2


def test_an_actor_scores_like_a_teacher_with_the_weights_that_it_writes_with(rollouts: RolloutDeployment) -> None:
    rows = rollouts.generate(rollouts.requests([0, LONG_PROMPT]), SamplingSettings(24, 1.0))
    rollouts.change_weights()
    version = rollouts.policy_version + 1
    rollouts.publish(version)
    asked = [(row["token_ids"], np.flatnonzero(row["loss_mask"])) for row in rows]
    ids, logprobs, scored_by = ray.get(rollouts.pool.actors[0].prompt_logprobs.remote(asked, 5, version))
    expected = torch.cat([expected_logprobs(rollouts.student, ids.tolist())[places - 1] for ids, places in asked])
    written = torch.from_numpy(np.concatenate([ids[places] for ids, places in asked])).long()
    best = expected.topk(5)
    assert scored_by == version
    np.testing.assert_allclose(logprobs[:, 0], expected[torch.arange(len(written)), written], atol=1e-4)
    np.testing.assert_array_equal(ids[:, 0], written)
    np.testing.assert_allclose(logprobs[:, 1:], best.values, atol=1e-4)
    np.testing.assert_array_equal(ids[:, 1:], best.indices)
    *_, too_old = ray.get(rollouts.pool.actors[0].prompt_logprobs.remote(asked, 5, version + 1))
    assert too_old == version


def test_an_incomplete_update_names_what_is_missing_and_a_complete_one_repairs_it(rollouts: RolloutDeployment) -> None:
    rollouts.change_weights()
    version = rollouts.policy_version + 1
    with pytest.raises(
        WeightSyncError, match=r"lacks model\.norm\.weight, model\.layers\.1\.self_attn\.k_proj\.weight"
    ):
        rollouts.publish(version, leave_out=["model.layers.1.self_attn.k_proj.weight", "model.norm.weight"])
    rollouts.publish(version + 1)
    [row] = rollouts.generate(rollouts.requests([4]), SamplingSettings(32, 1.0))
    assert largest_gap(rollouts, row) < 1e-5


def test_an_update_that_is_begun_anew_leaves_nothing_of_the_one_that_was_given_up(rollouts: RolloutDeployment) -> None:
    version = rollouts.policy_version + 1
    for is_given_up in (True, False):
        rollouts.change_weights()
        rollouts.publish(version, is_given_up=is_given_up)
    rows = rollouts.generate(rollouts.requests([4, LONG_PROMPT]), SamplingSettings(32, 1.0))
    assert max(largest_gap(rollouts, row) for row in rows) < 1e-5


def test_a_damaged_bucket_is_refused(rollouts: RolloutDeployment) -> None:
    version = rollouts.policy_version + 1
    with pytest.raises(WeightSyncError, match="damaged"):
        rollouts.publish(version, damage=True)
    rollouts.publish(version + 1)


def test_changes_alone_make_the_same_model_as_whole_parameters(rollouts: RolloutDeployment) -> None:
    sender = ObjectStoreSender(FrozenEngine(rollouts.student), WeightSyncConfig(payload="delta"), "float32", 60)
    first = rollouts.policy_version + 1
    whole = sender.publish(rollouts.pool.actors, first)
    rollouts.change_some_weights(every=50)
    delta = sender.publish(rollouts.pool.actors, first + 1)
    assert whole.changed_fraction is None
    assert delta.changed_fraction == pytest.approx(1 / 50, rel=0.05)
    assert delta.num_bytes < 0.03 * whole.num_bytes  # of 4 bytes per value, 5 per changed one
    rollouts.policy_version = first + 1
    rows = rollouts.generate(rollouts.requests([LONG_PROMPT, 2, 3]), SamplingSettings(32, 1.0))
    assert max(largest_gap(rollouts, row) for row in rows) < 1e-5
    assert rollouts.publish(first + 2) == delta.checksum


def test_a_worker_that_missed_a_version_is_sent_whole_parameters(rollouts: RolloutDeployment) -> None:
    sender = ObjectStoreSender(FrozenEngine(rollouts.student), WeightSyncConfig(payload="delta"), "float32", 60)
    up_to_date, late = rollouts.pool.actors
    first = rollouts.policy_version + 1
    whole = sender.publish([up_to_date, late], first)
    rollouts.change_some_weights(every=50)
    for_one = sender.publish([up_to_date], first + 1)
    rollouts.change_some_weights(every=50)
    for_both = sender.publish([up_to_date, late], first + 2)
    assert whole.num_bytes < for_both.num_bytes < whole.num_bytes + 1.1 * for_one.num_bytes
    rollouts.policy_version = first + 2
    rows = rollouts.generate(rollouts.requests([1, 2, 3, 4]), SamplingSettings(32, 1.0))
    assert max(largest_gap(rollouts, row) for row in rows) < 1e-5


def test_changes_to_a_version_that_a_worker_does_not_hold_are_refused(rollouts: RolloutDeployment) -> None:
    sender = ObjectStoreSender(FrozenEngine(rollouts.student), WeightSyncConfig(payload="delta"), "float32", 60)
    held = rollouts.policy_version + 1
    sender.publish(rollouts.pool.actors, held)
    with pytest.raises(WeightSyncError, match=rf"changes since policy version 99 arrived where version {held} is kept"):
        rollouts.publish(held + 1, base_version=99)
    rollouts.publish(held + 2)
