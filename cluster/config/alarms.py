"""Holds the settings of alarms, and the alarms that every run has unless its file changes them."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from cluster.config.fields import Count, Positive, Section

_log = logging.getLogger("preceptor")


class AlarmConfig(Section, frozen=True):
    """Acts when a metric of metrics.jsonl has been beyond a limit for some steps in a row.

    `shorten` lowers the longest completion by a quarter; `stop` writes a checkpoint and ends the run.
    """

    metric: str
    above: Positive | None = None  # it holds above this limit
    below: Positive | None = None  # or below this one
    relative_to: Literal["first", "recent"] | None = None  # limits multiply the metric's own level then
    steps: Count = 3  # in a row
    action: Literal["off", "warn", "shorten", "stop"] = "warn"

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise ValueError("an alarm has one limit, 'above' or 'below'")


DEFAULT_ALARMS: Mapping[str, Mapping[str, Any]] = {
    # A student that is only rewarded for likely tokens learns to go on; accuracy falls with it.
    "length_inflation": {"metric": "rollout/completion_length", "above": 3.0, "relative_to": "first"},
    "truncation": {"metric": "rollout/truncated_ratio", "above": 0.5},
    "repetition": {"metric": "rollout/repetition_ratio", "above": 0.2},
    "entropy_collapse": {"metric": "train/entropy", "below": 0.1, "relative_to": "first"},
    # Sampler and learner disagree, or the rows are too old for their ratio to correct.
    "importance": {"metric": "train/importance_p99", "above": 10.0},
    "gradient_spike": {"metric": "train/gradient_norm", "above": 10.0, "relative_to": "recent", "steps": 1},
    # How much of the student's distribution lies on the candidates, most often the teacher's most likely tokens.
    "overlap": {"metric": "train/student_candidate_mass", "below": 0.7, "relative_to": "first"},
}


def with_default_alarms(alarms: Any) -> Any:
    """Complete a run file's `[alarms.NAME]` tables by the fields of the rules of that name.

    Example:
        >>> with_default_alarms({"truncation": {"action": "stop"}})["truncation"]
        {'metric': 'rollout/truncated_ratio', 'above': 0.5, 'action': 'stop'}
    """
    if not isinstance(alarms, dict):
        return alarms  # the reader says what is wrong
    alarms = _with_new_names(alarms)
    names = [*DEFAULT_ALARMS, *(name for name in alarms if name not in DEFAULT_ALARMS)]
    return {name: _completed(DEFAULT_ALARMS.get(name, {}), alarms.get(name, {})) for name in names}


def _with_new_names(alarms: dict[str, Any]) -> dict[str, Any]:
    """Return the tables with today's name of the field that older run files call otherwise."""
    old = [name for name, given in alarms.items() if isinstance(given, dict) and "figure" in given]
    if old:
        _log.warning("alarms.%s.figure: the field is now called `metric`; rename it before the next release", old[0])
    return alarms | {
        name: {"metric" if field == "figure" else field: value for field, value in alarms[name].items()} for name in old
    }


def _completed(default: Mapping[str, Any], given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    # A limit on the one side takes the place of the default's on the other.
    replaced = {"above", "below"} if {"above", "below"} & set(given) else set()
    return {name: value for name, value in default.items() if name not in replaced} | given
