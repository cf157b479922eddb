"""The learning rate as a function of the step, so that a resumed run needs no schedule state."""

import math
from collections.abc import Callable

from cluster.contracts.learner import LearnerConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "constant": lambda _progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}


def learning_rate_at(step: int, num_steps: int, config: LearnerConfig) -> float:
    """Return the rate of optimizer step `step` (from 0) of `num_steps`.

    Warm-up rises linearly and reaches the peak with its last step; a decay falls from the peak to
    `min_learning_rate_ratio` of it at the last step.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decaying_steps = max(1, num_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decaying_steps)
    floor = config.min_learning_rate_ratio
    return config.learning_rate * (floor + (1.0 - floor) * DECAYS[config.lr_schedule](progress))
