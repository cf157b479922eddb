"""Builds the rows that travel from the turns of finished trajectories; pure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config.terms import TEACHER
from cluster.contracts.metrics import Max, Mean, Metric, Sum
from cluster.contracts.requests import Completion, RolloutRequest
from cluster.contracts.trajectory import FinishReason, GeneratedTrajectory, Ints, row_id
from rollout_workers.environments.base import Prompt

Segment = Ints | Completion


def build_trajectory(
    request: RolloutRequest,
    prompt: Prompt,
    segments: Sequence[Segment],
    finish_reason: FinishReason,
    reward: float | None,
    index: int = 0,
    turn: int = 0,
) -> GeneratedTrajectory:
    """Join the segments of a trajectory into one row.

    Segments are, in order, token ids that the student read and completions that it sampled, at least one of these.
    `loss_mask` is 1 on completions, their EOS included; the columns per completion token hold their values one
    completion after the other. `index` numbers an episode's rows, and `turn` is that of the row's first completion.
    """
    completions = [segment for segment in segments if isinstance(segment, Completion)]
    oldest, newest, changes = policy_versions(np.concatenate([part.policy_versions for part in completions]))
    return GeneratedTrajectory(
        trajectory_id=row_id(request.trajectory_id, index),
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        teacher=prompt.teacher,
        domain=prompt.domain,
        min_policy_version=oldest,
        max_policy_version=newest,
        version_changes=changes,
        token_ids=np.concatenate([token_ids_of(segment) for segment in segments]),
        loss_mask=np.repeat(
            np.array([isinstance(segment, Completion) for segment in segments], np.uint8),
            [len(token_ids_of(segment)) for segment in segments],
        ),
        rollout_logprobs=np.concatenate([part.logprobs for part in completions]),
        finish_reason=finish_reason,
        reward=reward,
        scorer_prompts={} if prompt.teacher_token_ids is None else {TEACHER: prompt.teacher_token_ids},
        candidate_ids=_joined([part.candidate_ids for part in completions]),
        candidate_rollout_logprobs=_joined([part.candidate_logprobs for part in completions]),
        episode_id=request.trajectory_id,
        turn=turn,
    )


def failed_row(
    request: RolloutRequest, prompt: Prompt, policy_version: int, num_candidates: int
) -> GeneratedTrajectory:
    """Return the row of an episode whose environment failed before the first completion."""
    nothing = np.empty(0, np.int32)
    width = (0, num_candidates)
    completion = Completion(
        nothing,
        np.empty(0, np.float32),
        "environment_error",
        nothing,
        np.empty(width, np.int32) if num_candidates else None,
        np.empty(width, np.float32) if num_candidates else None,
    )
    row = build_trajectory(request, prompt, [prompt.token_ids, completion], "environment_error", None)
    return replace(row, min_policy_version=policy_version, max_policy_version=policy_version)


def token_ids_of(segment: Segment) -> Ints:
    return segment.token_ids if isinstance(segment, Completion) else segment


def policy_versions(by_token: Ints) -> tuple[int, int, Ints]:
    """Return the oldest and the newest version, and the tokens sampled before each version after the oldest.

    `by_token` has the version that sampled each token; of no tokens, both versions are 0.

    Example:
        >>> policy_versions(np.array([4, 4, 4, 5, 7]))[2].tolist()
        [3, 4, 4]
    """
    oldest, newest = (int(by_token[0]), int(by_token[-1])) if len(by_token) else (0, 0)
    later = np.arange(oldest + 1, newest + 1)
    return oldest, newest, np.searchsorted(by_token, later).astype(np.int32)


def _joined(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Join the candidates of all completions; the sampling settings give them to all of them or to none."""
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


def rollout_metrics(
    rows: Sequence[GeneratedTrajectory], seconds: float, stops_repetition: bool = False, has_turns: bool = False
) -> dict[str, Metric]:
    """Measure a batch's rows of the student; without `stops_repetition`, the share of repetition is unknown.

    `seconds` is the worker's time since its previous batch, so that a worker's sum is its time. An episode of several
    rows counts once, and one whose environment failed only as that. `has_turns` says that episodes may be of several.
    """
    episodes: dict[int, list[GeneratedTrajectory]] = {}
    for row in rows:
        episodes.setdefault(row.episode, []).append(row)
    finished = [of_one for of_one in episodes.values() if of_one[-1].finish_reason != "environment_error"]
    lasts = [of_one[-1] for of_one in finished]
    lengths = [sum(len(row.rollout_logprobs) for row in of_one) for of_one in finished]
    rewards = [row.reward for row in lasts if row.reward is not None]
    metrics: dict[str, Metric] = {"rollout/tokens": Sum(float(sum(lengths))), "rollout/seconds": Sum(seconds)}
    if has_turns:
        metrics["rollout/environment_errors"] = Sum(float(len(episodes) - len(finished)))
    if not finished:
        return metrics
    metrics |= {
        "rollout/completion_length": Mean(float(sum(lengths)), float(len(finished))),
        "rollout/completion_length_max": Max(float(max(lengths))),
        "rollout/truncated_ratio": _ended_by("length", lasts),
    }
    if stops_repetition:
        metrics["rollout/repetition_ratio"] = _ended_by("repetition", lasts)
    if has_turns:
        metrics["rollout/turns"] = Mean(float(sum(map(_num_turns, finished))), float(len(finished)))
    if rewards:
        metrics["rollout/reward"] = Mean(float(sum(rewards)), float(len(rewards)))
    return metrics


def _ended_by(reason: FinishReason, rows: Sequence[GeneratedTrajectory]) -> Metric:
    return Mean(float(sum(row.finish_reason == reason for row in rows)), float(len(rows)))


def _num_turns(rows: Sequence[GeneratedTrajectory]) -> int:
    """Count the completions of an episode: what it sampled without a pause, since nothing stood between."""
    return sum(int(np.count_nonzero(np.diff(row.loss_mask.astype(np.int8), prepend=0) == 1)) for row in rows)
