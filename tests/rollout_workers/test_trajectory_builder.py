"""Rows and metrics from requests and completions."""

import numpy as np
import pytest

from cluster.contracts.interfaces import Completion, RolloutRequest
from cluster.contracts.metrics import report
from rollout_workers.trajectory_builder import (
    PolicyVersions,
    PromptFacts,
    before_stop,
    build_trajectory,
    rollout_metrics,
)
from tests.builders import make_trajectory


def test_the_loss_mask_marks_exactly_the_completion_and_versions_are_kept_in_order() -> None:
    prompt = PromptFacts(np.array([7, 8, 9], np.int32), "math", "algebra", None)
    completion = Completion(np.array([4, 1], np.int32), np.array([-0.5, -0.25], np.float32), "stop")
    row = build_trajectory(RolloutRequest(11, 5, 2, seed=0), prompt, completion, PolicyVersions(3, 4), None)
    assert row.token_ids.tolist() == [7, 8, 9, 4, 1]
    assert row.loss_mask.tolist() == [0, 0, 0, 1, 1]
    assert (row.min_policy_version, row.max_policy_version) == (3, 4)
    assert (row.trajectory_id, row.prompt_id, row.sample_index) == (11, 5, 2)
    assert (row.teacher, row.domain, row.reward) == ("math", "algebra", None)


def test_text_ends_before_the_earliest_stop_string() -> None:
    assert before_stop(" 4 END 5 STOP", ["STOP", "END"]) == "4"
    assert before_stop(" 4 ", []) == "4"


def test_metrics_count_completions_and_average_only_verified_rewards() -> None:
    rows = [
        make_trajectory(completion=[3] * 6, finish_reason="length", reward=0.0),
        make_trajectory(completion=[3] * 2, reward=1.0),
        make_trajectory(completion=[3] * 1, reward=None),
    ]
    values = report(rollout_metrics(rows, seconds=2.0))
    assert values["rollout/tokens"] == 9
    assert values["rollout/completion_length"] == 3
    assert values["rollout/completion_length_max"] == 6
    assert values["rollout/truncated_ratio"] == pytest.approx(1 / 3)
    assert values["rollout/reward"] == 0.5
    assert values["rollout/seconds"] == 2.0


def test_without_any_answer_there_is_no_reward_metric() -> None:
    assert "rollout/reward" not in rollout_metrics([make_trajectory()], seconds=1.0)
