"""Conditions on rows, read as expressions and never evaluated by Python."""

import pyarrow as pa
import pytest

from cluster.contracts.errors import ConfigError
from cluster.contracts.row_filter import parse_filter

ROWS = pa.table(
    {"step": [1, 2, 3, 4], "reward": [0.0, 1.0, None, -1.0], "finish_reason": ["stop", "length", "stop", "stop"]}
)


@pytest.mark.parametrize(
    ("condition", "steps"),
    [
        ("reward > 0", [2]),
        ("reward >= -1 and not reward > 0", [1, 4]),
        ("0 < step <= 2", [1, 2]),
        ("finish_reason != 'stop' or step == 4", [2, 4]),
        ("step in [2, 4]", [2, 4]),
        ("step not in (2, 4)", [1, 3]),
        ("is_null(reward)", [3]),
        ("2 * step + 1 > 6", [3, 4]),
        ("-step / 2 < -1.5", [4]),
    ],
)
def test_a_condition_chooses_rows(condition: str, steps: list[int]) -> None:
    assert ROWS.filter(parse_filter(condition))["step"].to_pylist() == steps


@pytest.mark.parametrize(
    "condition",
    [
        "",
        "reward >",
        "True",
        "__import__('os').system('true')",
        "step is 1",
        "step in reward",
        "step == None",
        "a.b > 0",
    ],
)
def test_anything_else_is_refused(condition: str) -> None:
    with pytest.raises(ConfigError, match="expected comparisons of columns"):
        parse_filter(condition)
