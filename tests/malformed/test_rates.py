"""Rates files, and directories of runs that rates are read off."""

from pathlib import Path

import pytest

from cluster.config.run_file import dump_run_config
from cluster.contracts.errors import CheckpointError, ConfigError
from cluster.simulation.command import load_rates
from tests.builders import make_config
from tests.malformed.rates_cases import GOOD, RATES_FILES
from tests.malformed.refusal import assert_refused

METRICS = (
    '{"step": 3, "tokens": 30, "completion_tokens": 20, "rollout/completion_length": 20, '
    '"rollout/completion_length_max": 20, "learn/tokens_per_second": 5, "sync/seconds": 0}\n'
)
DIRECTORIES = {
    "no trace": (METRICS, None, "trace.json: cannot read the run's trace"),
    "trace is a list": (METRICS, "[]", "trace.json: not what a run writes: Expected `object`, got `array`"),
    "trace without calls": (METRICS, '{"traceEvents": []}', "0 traced rollouts are too few"),
    "call that ends before it begins": (
        METRICS,
        '{"traceEvents": [{"ph": "X", "name": "generate", "pid": 1, "ts": 5, "dur": -1}]}',
        "trace.json: not what a run writes: Expected `float` >= 0.0",
    ),
    "figures are no JSON": ("step 3\n", '{"traceEvents": []}', "metrics.jsonl: not what a run writes"),
    "a figure is missing": ('{"step": 3}\n', '{"traceEvents": []}', "missing required field `tokens`"),
    "a figure is null": (METRICS.replace("30", "null"), '{"traceEvents": []}', "Expected `float`, got `null`"),
}


@pytest.mark.parametrize("name", RATES_FILES)
def test_a_rates_file_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    content, says = RATES_FILES[name]
    path = tmp_path / "measured.json"
    path.write_bytes(content)
    assert_refused(lambda: load_rates(path, make_config()), ConfigError, says, tmp_path)


def test_the_rates_file_that_the_cases_are_made_of_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(GOOD)
    assert load_rates(path, make_config()).learner.tokens_per_second == 1000


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_damaged_run_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    metrics, trace, says = DIRECTORIES[name]
    (tmp_path / "config.json").write_text(dump_run_config(make_config()))
    (tmp_path / "metrics.jsonl").write_text(metrics)
    if trace is not None:
        (tmp_path / "trace.json").write_text(trace)
    assert_refused(lambda: load_rates(tmp_path, make_config()), ConfigError, says, tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert_refused(lambda: load_rates(tmp_path, make_config()), CheckpointError, "holds no run", tmp_path)


def test_an_absent_rates_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "absent.json"
    assert_refused(lambda: load_rates(path, make_config()), ConfigError, "absent.json: cannot read the rates file")
