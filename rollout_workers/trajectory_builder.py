"""From what an engine wrote to the rows that travel; pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.contracts.interfaces import Completion, RolloutRequest
from cluster.contracts.metrics import Max, Mean, Metric, Sum
from cluster.contracts.trajectory import GeneratedTrajectory, Ints


@dataclass(frozen=True)
class PromptFacts:
    """What a worker knows of one prompt."""

    token_ids: Ints  # [prompt_tokens]
    teacher: str
    domain: str
    answer: str | None  # None: nothing to verify against


@dataclass(frozen=True)
class PolicyVersions:
    """The student's versions while one completion was written."""

    oldest: int
    newest: int


def build_trajectory(
    request: RolloutRequest, prompt: PromptFacts, completion: Completion, versions: PolicyVersions, reward: float | None
) -> GeneratedTrajectory:
    """Join prompt and completion into one row; `loss_mask` is 1 on what the student sampled, its EOS included."""
    return GeneratedTrajectory(
        trajectory_id=request.trajectory_id,
        prompt_id=request.prompt_id,
        sample_index=request.sample_index,
        teacher=prompt.teacher,
        domain=prompt.domain,
        min_policy_version=versions.oldest,
        max_policy_version=versions.newest,
        token_ids=np.concatenate([prompt.token_ids, completion.token_ids]).astype(np.int32),
        loss_mask=np.repeat(np.array([0, 1], np.uint8), [len(prompt.token_ids), len(completion.token_ids)]),
        rollout_logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        reward=reward,
    )


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return what precedes the first stop string, without white space at the ends; the stop string is no answer.

    Example:
        >>> before_stop(" 42 END", ["END"])
        '42'
    """
    ends = [text.find(string) for string in stop if string in text]
    return text[: min(ends, default=len(text))].strip()


def rollout_metrics(rows: Sequence[GeneratedTrajectory], seconds: float) -> dict[str, Metric]:
    """Measure a batch; `seconds` is the worker's time since its previous batch, so that a worker's sum is its time."""
    lengths = [len(row.rollout_logprobs) for row in rows]
    truncated = sum(row.finish_reason == "length" for row in rows)
    rewards = [row.reward for row in rows if row.reward is not None]
    metrics: dict[str, Metric] = {
        "rollout/tokens": Sum(float(sum(lengths))),
        "rollout/seconds": Sum(seconds),
        "rollout/completion_length": Mean(float(sum(lengths)), float(len(rows))),
        "rollout/completion_length_max": Max(float(max(lengths))),
        "rollout/truncated_ratio": Mean(float(truncated), float(len(rows))),
    }
    if rewards:
        metrics["rollout/reward"] = Mean(float(sum(rewards)), float(len(rewards)))
    return metrics
