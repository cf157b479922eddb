"""The verifier's reward of a trajectory, relative to the other samples of the same prompt in the step."""

from collections.abc import Sequence

import numpy as np

from cluster.contracts.errors import ConfigError
from cluster.contracts.interfaces import BatchHandle
from cluster.contracts.objective import ObjectiveConfig, TaskRewardTerm

EPSILON = 1e-4  # added to the deviation, which is 0 where all samples have the same reward


def step_advantages(handles: Sequence[BatchHandle], objective: ObjectiveConfig) -> list[float]:
    """Return the advantage of every row of a step's batches, in order; 0 where the objective has no task reward.

    Raises:
        ConfigError: two task rewards of the objective want different advantages.
    """
    divides = {term.divide_by_deviation for term in objective.terms.values() if isinstance(term, TaskRewardTerm)}
    if not divides:
        return [0.0 for handle in handles for _ in handle.num_tokens]
    if len(divides) > 1:
        raise ConfigError("objective.terms: all task_reward terms must have the same divide_by_deviation")
    prompt_ids = [prompt_id for handle in handles for prompt_id in handle.prompt_ids]
    rewards = [reward for handle in handles for reward in handle.rewards]
    return group_advantages(prompt_ids, rewards, divides.pop())


def group_advantages(
    prompt_ids: Sequence[int], rewards: Sequence[float | None], divide_by_deviation: bool
) -> list[float]:
    """Return each row's reward minus the mean of its prompt's, over their sample deviation if asked for (GRPO).

    Rows without a reward, and those that are alone with theirs, have advantage 0.

    Example:
        >>> group_advantages([7, 7, 8], [1.0, 0.0, 1.0], divide_by_deviation=False)
        [0.5, -0.5, 0.0]
    """
    groups: dict[int, list[int]] = {}
    for row, (prompt_id, reward) in enumerate(zip(prompt_ids, rewards, strict=True)):
        if reward is not None:
            groups.setdefault(prompt_id, []).append(row)
    advantages = np.zeros(len(rewards))
    for rows in groups.values():
        if len(rows) > 1:
            of_group = np.array([rewards[row] for row in rows], np.float64)
            deviation = of_group.std(ddof=1) + EPSILON if divide_by_deviation else 1.0
            advantages[rows] = (of_group - of_group.mean()) / deviation
    return [float(advantage) for advantage in advantages]
