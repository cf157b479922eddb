"""The learning rate, step by step."""

import pytest

from cluster.config.stages import LearnerConfig
from learner.train_step import learning_rate_at


def rates(schedule, num_steps, warmup_steps=0, ratio=0.1):
    config = LearnerConfig(
        learning_rate=1.0, lr_schedule=schedule, warmup_steps=warmup_steps, min_learning_rate_ratio=ratio
    )
    return [learning_rate_at(step, num_steps, config) for step in range(num_steps)]


def test_constant_stays_at_the_peak():
    assert rates("constant", 3) == [1.0, 1.0, 1.0]


def test_warmup_reaches_the_peak_with_its_last_step():
    assert rates("constant", 5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear_falls_to_the_ratio_at_the_last_step():
    assert rates("linear", 3, ratio=0.5) == [1.0, 0.75, 0.5]


def test_cosine_is_halfway_down_in_the_middle():
    assert rates("cosine", 3, ratio=0.0) == pytest.approx([1.0, 0.5, 0.0])


def test_a_schedule_of_one_step_uses_the_peak():
    assert rates("cosine", 1) == [1.0]
