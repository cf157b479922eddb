"""Rates of hardware on which times can be told by hand."""

from typing import Any

from cluster.simulation.rates import LearnerRates, Rates, RolloutRates, TeacherRates


def make_rates(**changes: Any) -> Rates:
    """Return prompts of 10 and completions of 100 tokens at 10 ms each; reading 1000 and learning 10000 tokens/s."""
    defaults: dict[str, Any] = {
        "rollout": RolloutRates(((1, 0.01),), (10.0,), (100.0,)),
        "teachers": {"main": TeacherRates(1000.0)},
        "learner": LearnerRates(10_000.0),
        "seconds_per_call": 0.0,
    }
    return Rates(**{**defaults, **changes})
