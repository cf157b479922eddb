"""Rows and metrics from requests and completions."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.contracts.metrics import report
from cluster.contracts.requests import Completion, RolloutRequest
from cluster.contracts.trajectory import make_generated, masked, ragged, row_id
from rollout_workers.environments.base import Prompt
from rollout_workers.trajectory_builder import (
    build_trajectory,
    policy_versions,
    rollout_metrics,
)
from tests.builders import make_trajectory


def written_by(*versions: int) -> Completion:
    """Return a completion of tokens 50, 51, ..., by the version that wrote each."""
    token_ids = np.arange(50, 50 + len(versions), dtype=np.int32)
    return Completion(token_ids, np.zeros(len(versions), np.float32), "stop", np.array(versions, np.int32))


def test_the_loss_mask_marks_exactly_the_completion_and_versions_are_kept_in_order() -> None:
    prompt = Prompt(np.array([7, 8, 9], np.int32), "", "math", "algebra", None)
    completion = written_by(3, 4)
    row = build_trajectory(RolloutRequest(11, 5, 2, seed=0), prompt, [prompt.token_ids, completion], "stop", None)
    assert row.token_ids.tolist() == [7, 8, 9, 50, 51]
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert (row.min_policy_version, row.max_policy_version, row.version_changes.tolist()) == (3, 4, [1])
    assert (row.trajectory_id, row.prompt_id, row.sample_index) == (11, 5, 2)
    assert (row.teacher, row.domain, row.reward) == ("math", "algebra", None)


def test_candidates_travel_from_the_completion_to_the_row() -> None:
    prompt = Prompt(np.array([7], np.int32), "", "math", "algebra", None)
    ids, logprobs = np.array([[5, 4], [1, 2]], np.int32), np.full((2, 2), -0.5, np.float32)
    completion = replace(written_by(0, 0), candidate_ids=ids, candidate_logprobs=logprobs)
    row = build_trajectory(RolloutRequest(0, 0, 0, seed=0), prompt, [prompt.token_ids, completion], "stop", None)
    batch = make_generated([row])
    assert ragged(batch, "candidate_ids")[0].tolist() == [[5, 4], [1, 2]]
    assert ragged(batch, "candidate_rollout_logprobs")[0].tolist() == [[-0.5, -0.5], [-0.5, -0.5]]


@pytest.mark.parametrize(
    ("by_token", "oldest", "newest", "changes"),
    [
        ([3, 3, 3], 3, 3, []),
        ([3, 3, 4, 4, 4, 5], 3, 5, [2, 5]),
        ([3, 3, 6], 3, 6, [2, 2, 2]),  # versions 4 and 5 wrote nothing
        ([], 0, 0, []),
    ],
)
def test_versions_change_where_the_first_token_of_the_next_was_written(
    by_token: list[int], oldest: int, newest: int, changes: list[int]
) -> None:
    found_oldest, found_newest, found_changes = policy_versions(np.array(by_token, np.int32))
    assert (found_oldest, found_newest, found_changes.tolist()) == (oldest, newest, changes)


def test_metrics_count_completions_and_average_only_verified_rewards() -> None:
    rows = [
        make_trajectory(completion=[3] * 6, finish_reason="length", reward=0.0),
        make_trajectory(completion=[3] * 2, reward=1.0, trajectory_id=1),
        make_trajectory(completion=[3] * 1, reward=None, trajectory_id=2),
    ]
    values = report(rollout_metrics(rows, seconds=2.0))
    assert values["rollout/tokens"] == 9
    assert values["rollout/completion_length"] == 3
    assert values["rollout/completion_length_max"] == 6
    assert values["rollout/truncated_ratio"] == pytest.approx(1 / 3)
    assert values["rollout/reward"] == 0.5
    assert values["rollout/seconds"] == 2.0


def test_repetition_is_reported_where_it_is_looked_for_and_is_no_truncation() -> None:
    rows = [make_trajectory(trajectory_id=index) for index in range(3)]
    rows += [make_trajectory(finish_reason="repetition", trajectory_id=3)]
    values = report(rollout_metrics(rows, seconds=1.0, stops_repetition=True))
    assert (values["rollout/repetition_ratio"], values["rollout/truncated_ratio"]) == (0.25, 0.0)
    assert "rollout/repetition_ratio" not in rollout_metrics(rows, seconds=1.0)


def test_without_any_answer_there_is_no_reward_metric() -> None:
    assert "rollout/reward" not in rollout_metrics([make_trajectory()], seconds=1.0)


def test_an_episode_counts_once_and_one_whose_environment_failed_only_as_that() -> None:
    rows = [
        make_trajectory(completion=[3] * 4, reward=1.0),
        make_trajectory(
            (1,), [3] * 2, trajectory_id=row_id(0, 1), episode_id=0, turn=1, finish_reason="length", reward=1.0
        ),
        make_trajectory(completion=[3] * 2, reward=0.0, trajectory_id=1),
        masked(make_trajectory(trajectory_id=2, finish_reason="environment_error")),
    ]
    rows[2] = replace(rows[2], token_ids=np.arange(5, dtype=np.int32), loss_mask=np.array([0, 1, 0, 0, 1], np.uint8))
    values = report(rollout_metrics(rows, seconds=1.0, has_turns=True))
    assert values["rollout/environment_errors"] == 1
    assert values["rollout/reward"] == 0.5
    assert values["rollout/completion_length"] == 4  # 6 and 2
    assert values["rollout/truncated_ratio"] == 0.5
    assert values["rollout/turns"] == 2
    assert set(rollout_metrics(rows[3:], 1.0, has_turns=True)) == {
        "rollout/tokens", "rollout/seconds", "rollout/environment_errors"
    }  # fmt: skip
