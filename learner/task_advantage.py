"""The verifier's reward of a trajectory, relative to the other samples of the same prompt in the step."""

from collections.abc import Sequence

import numpy as np

from cluster.contracts.errors import ConfigError
from cluster.contracts.objective import ObjectiveConfig, TaskRewardTerm

EPSILON = 1e-4  # added to the deviation, which is 0 where all samples have the same reward


def divides_by_deviation(objective: ObjectiveConfig) -> bool | None:
    """Return how the objective's task reward is normalised; None where it has none.

    Raises:
        ConfigError: two task rewards of the objective want different advantages.
    """
    found = {term.divide_by_deviation for term in objective.terms.values() if isinstance(term, TaskRewardTerm)}
    if len(found) > 1:
        raise ConfigError("objective.terms: all task_reward terms must have the same divide_by_deviation")
    return found.pop() if found else None


def group_advantages(rewards: Sequence[float | None], divide_by_deviation: bool) -> list[float]:
    """Return each sample's reward minus the mean of its prompt's samples, over their deviation if asked for (GRPO).

    Samples without a reward, and one that is alone with its, have advantage 0.

    Example:
        >>> group_advantages([1.0, 0.0, None], divide_by_deviation=False)
        [0.5, -0.5, 0.0]
    """
    given = np.array([reward for reward in rewards if reward is not None], np.float64)
    if len(given) < 2:
        return [0.0] * len(rewards)
    deviation = given.std(ddof=1) + EPSILON if divide_by_deviation else 1.0
    return [0.0 if reward is None else float((reward - given.mean()) / deviation) for reward in rewards]
