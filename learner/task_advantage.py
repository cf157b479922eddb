"""The verifier's reward of a trajectory, relative to the other samples of the same prompt in the step."""

from collections.abc import Sequence

import numpy as np

from cluster.contracts.objective import ObjectiveConfig, TaskRewardTerm

EPSILON = 1e-4  # added to the deviation, which is 0 where all samples have the same reward


def divides_by_deviation(objective: ObjectiveConfig) -> bool | None:
    """Return how the objective's task rewards are normalised, which is the same for all; None where it has none."""
    found = {term.divide_by_deviation for term in objective.terms.values() if isinstance(term, TaskRewardTerm)}
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
