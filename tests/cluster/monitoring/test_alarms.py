"""Rules over a run's figures: when they go off, and what they change."""

import pytest

from cluster.config.alarms import DEFAULT_ALARMS, AlarmConfig
from cluster.config.stages import HorizonConfig
from cluster.contracts.errors import ConfigError
from cluster.monitoring.alarms import FIRST_STEPS, Alarms, LengthCap
from tests.builders import make_config


def raised_at(config: AlarmConfig, values: list[float | None]) -> list[int]:
    """Return the steps, from 1, at which the alarm goes off."""
    alarms = Alarms({"only": config})
    records = [{"step": step} | ({} if value is None else {"x": value}) for step, value in enumerate(values, start=1)]
    return [raised.step for record in records for raised in alarms.check(record)]


def test_an_alarm_goes_off_once_when_its_rule_has_held_long_enough() -> None:
    assert raised_at(AlarmConfig("x", above=1.0, steps=2), [2, 2, 2, 2]) == [2]


def test_a_step_on_the_right_side_begins_the_count_anew() -> None:
    assert raised_at(AlarmConfig("x", above=1.0, steps=2), [2, 1, 2, 2, 0, 2, 2]) == [4, 7]


def test_the_limit_itself_is_allowed() -> None:
    assert raised_at(AlarmConfig("x", above=1.0, steps=1), [1.0, 1.01]) == [2]
    assert raised_at(AlarmConfig("x", below=1.0, steps=1), [1.0, 0.99]) == [2]


def test_a_figure_that_a_step_lacks_changes_nothing() -> None:
    assert raised_at(AlarmConfig("x", above=1.0, steps=2), [2, None, 2]) == [3]


def test_a_limit_relative_to_the_first_steps_multiplies_their_mean() -> None:
    first = [float(value) for value in range(1, FIRST_STEPS + 1)]  # mean 5.5
    rule = AlarmConfig("x", above=2.0, relative_to="first", steps=1)
    assert raised_at(rule, [*first, 11.0, 11.1]) == [FIRST_STEPS + 2]
    assert raised_at(rule, [1.0, 100.0]) == []  # there is no first level yet


def test_a_limit_relative_to_recent_steps_multiplies_their_median_and_leaves_out_the_step_itself() -> None:
    rule = AlarmConfig("x", above=10.0, relative_to="recent", steps=1)
    assert raised_at(rule, [1, 1, 1, 1, 11]) == []
    assert raised_at(rule, [1, 1, 1, 1, 1, 11, 1, 10]) == [6]


def test_an_alarm_that_is_off_never_goes_off() -> None:
    assert raised_at(AlarmConfig("x", above=1.0, steps=1, action="off"), [2.0]) == []


def test_the_recorded_steps_shown_again_lead_to_the_same_alarms() -> None:
    values = [1.0] * 12 + [4.0, 4.0, 4.0, 4.0]
    rule = AlarmConfig("x", above=3.0, relative_to="first")
    through, resumed = Alarms({"only": rule}), Alarms({"only": rule})
    records = [{"step": float(step), "x": value} for step, value in enumerate(values)]
    found = [through.check(record) for record in records]
    for record in records[:14]:
        resumed.check(record)
    assert [resumed.check(record) for record in records[14:]] == found[14:]
    assert [len(raised) for raised in found[14:]] == [1, 0]


def test_every_default_alarm_can_go_off() -> None:
    for name, alarm in make_config().alarms.items():
        level = [1.0] * FIRST_STEPS if alarm.relative_to else []
        bad = 1e-3 if alarm.below else 1e3
        assert len(raised_at(replace_figure(alarm), [*level, *[bad] * alarm.steps])) == 1, name


def replace_figure(alarm: AlarmConfig) -> AlarmConfig:
    return AlarmConfig("x", alarm.above, alarm.below, alarm.relative_to, alarm.steps)


def test_a_run_file_changes_single_fields_of_a_default_and_adds_its_own() -> None:
    alarms = make_config("alarms.truncation.action=stop", "alarms.mine.metric=train/kl", "alarms.mine.above=9").alarms
    assert (alarms["truncation"].above, alarms["truncation"].action) == (0.5, "stop")
    assert alarms["mine"] == AlarmConfig("train/kl", above=9.0)
    assert set(alarms) == {*DEFAULT_ALARMS, "mine"}


def test_a_limit_on_the_other_side_takes_the_defaults_place() -> None:
    alarm = make_config("alarms.truncation.below=0.1").alarms["truncation"]
    assert (alarm.above, alarm.below) == (None, 0.1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["alarms.mine.metric=train/kl"], "one limit"),
        (["alarms.truncation.above=0.1", "alarms.truncation.below=0.1"], "one limit"),
        (["alarms.truncation.action=panic"], "alarms"),
        (["alarms=3"], "alarms"),
    ],
)
def test_a_wrong_alarm_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        make_config(*overrides)
    assert "\n" not in str(refused.value)


def test_the_cap_falls_by_a_quarter_each_time_and_stops_at_the_shortest() -> None:
    cap = LengthCap(max_completion_tokens=40, max_staleness=0)
    caps = []
    for step in range(1, 6):
        cap.lower(after_step=step)
        caps.append(cap.at(step))
    assert caps == [30, 22, 16, 16, 16]
    assert cap.at(0) == 40


def test_steps_that_may_be_under_way_keep_their_cap() -> None:
    cap = LengthCap(max_completion_tokens=100, max_staleness=2)
    cap.lower(after_step=5)
    assert [cap.at(step) for step in (5, 6, 7)] == [100, 100, 75]


PAYS = {"rollout/truncated_ratio": 0.2, "teacher/log_ratio": 0.4, "teacher/cut_tail_log_ratio": 0.2}


@pytest.mark.parametrize(
    ("change", "lengthens"),
    [
        ({}, True),
        ({"rollout/truncated_ratio": 0.21}, False),  # the student has still to learn to end
        ({"rollout/truncated_ratio": 0.0}, False),  # nothing was cut off
        ({"teacher/cut_tail_log_ratio": 0.19}, False),  # the ends teach less than half as much as all tokens
    ],
)
def test_a_horizon_lengthens_completions_while_that_pays(change: dict[str, float], lengthens: bool) -> None:
    cap = LengthCap(100, max_staleness=1, horizon=HorizonConfig(start=40, factor=2.0))
    cap.observe({"step": 3, **PAYS, **change})
    assert [cap.at(step) for step in (0, 3, 4)] == [40, 40, 80 if lengthens else 40]


def test_a_horizon_ends_at_the_longest_and_an_alarm_shortens_what_it_has_reached() -> None:
    cap = LengthCap(100, max_staleness=0, horizon=HorizonConfig(start=40, factor=2.0))
    for step in (1, 2, 3):
        cap.observe({"step": step, **PAYS})
    cap.lower(after_step=4)
    assert [cap.at(step) for step in range(5)] == [40, 80, 100, 100, 75]


def test_an_older_run_file_may_call_the_metric_a_figure_and_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ("alarms.mine.figure=train/kl", "alarms.mine.above=9", "alarms.overlap.figure=train/loss")
    alarms = make_config(*overrides).alarms
    assert (alarms["mine"].metric, alarms["overlap"].metric) == ("train/kl", "train/loss")
    assert len(caplog.records) == 1
