"""From what an engine wrote to the rows that travel; pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.contracts.metrics import Max, Mean, Metric, Sum
from cluster.contracts.requests import Completion, RolloutRequest
from cluster.contracts.trajectory import FinishReason, GeneratedTrajectory, Ints


@dataclass(frozen=True)
class PromptFacts:
    """What a worker knows of one prompt."""

    token_ids: Ints  # [prompt_tokens]
    teacher: str
    domain: str
    answer: str | None  # None: nothing to verify against


@dataclass(frozen=True)
class PolicyVersions:
    """The student's versions that wrote one completion."""

    oldest: int
    newest: int
    changes: Ints  # [newest - oldest] tokens written before each version after the oldest

    @classmethod
    def of(cls, by_token: Ints) -> "PolicyVersions":
        """Read them off the version that wrote each token; of no tokens they are none but 0.

        Example:
            >>> PolicyVersions.of(np.array([4, 4, 4, 5, 7])).changes.tolist()
            [3, 4, 4]
        """
        oldest, newest = (int(by_token[0]), int(by_token[-1])) if len(by_token) else (0, 0)
        later = np.arange(oldest + 1, newest + 1)
        return cls(oldest, newest, np.searchsorted(by_token, later).astype(np.int32))


def build_trajectory(
    request: RolloutRequest, prompt: PromptFacts, completion: Completion, reward: float | None
) -> GeneratedTrajectory:
    """Join prompt and completion into one row; `loss_mask` is 1 on what the student sampled, its EOS included."""
    versions = PolicyVersions.of(completion.policy_versions)
    return GeneratedTrajectory(
        trajectory_id=request.trajectory_id,
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        teacher=prompt.teacher,
        domain=prompt.domain,
        min_policy_version=versions.oldest,
        max_policy_version=versions.newest,
        version_changes=versions.changes,
        token_ids=np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int32),
        loss_mask=np.repeat(np.array([0, 1], np.uint8), [len(prompt.token_ids), len(completion.token_ids)]),
        rollout_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        reward=reward,
        candidate_ids=completion.candidate_ids,
        candidate_rollout_logprobs=completion.candidate_logprobs,
    )


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return what precedes the first stop string, without white space at the ends; the stop string is no answer.

    Example:
        >>> before_stop(" 42 END", ["END"])
        '42'
    """
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends, default=len(text))].strip()


def rollout_metrics(
    rows: Sequence[GeneratedTrajectory], seconds: float, stops_repetition: bool = False
) -> dict[str, Metric]:
    """Measure a batch.

    Args:
        rows: at least one.
        seconds: the worker's time since its previous batch, so that a worker's sum is its time.
        stops_repetition: whether repetition was looked for; where it was not, nobody knows how much there is.
    """
    lengths = [len(row.rollout_logprobs) for row in rows]
    rewards = [row.reward for row in rows if row.reward is not None]
    metrics: dict[str, Metric] = {
        "rollout/tokens": Sum(float(sum(lengths))),
        "rollout/seconds": Sum(seconds),
        "rollout/completion_length": Mean(float(sum(lengths)), float(len(rows))),
        "rollout/completion_length_max": Max(float(max(lengths))),
        "rollout/truncated_ratio": _ended_by("length", rows),
    }
    if stops_repetition:
        metrics["rollout/repetition_ratio"] = _ended_by("repetition", rows)
    if rewards:
        metrics["rollout/reward"] = Mean(float(sum(rewards)), float(len(rewards)))
    return metrics


def _ended_by(reason: FinishReason, rows: Sequence[GeneratedTrajectory]) -> Metric:
    return Mean(float(sum(row.finish_reason == reason for row in rows)), float(len(rows)))
