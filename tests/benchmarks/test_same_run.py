"""Two runs are compared by what they learned."""

import math
from pathlib import Path

import pytest

from benchmarks.same_run import compare_ledgers, differences


def test_times_do_not_count() -> None:
    assert differences([{"kl": 1.0, "step/seconds": 1.0}], [{"kl": 1.0, "step/seconds": 2.0}]) == {}


def test_the_largest_relative_difference_of_all_steps_is_said() -> None:
    first, second = [{"kl": 2.0}, {"kl": 4.0}], [{"kl": 2.2}, {"kl": 5.0}]
    assert differences(first, second) == {"kl": 0.25}


def test_a_metric_that_one_run_lacks_differs() -> None:
    assert differences([{"kl": 2.0}], [{}]) == {"kl": math.inf}


def test_a_run_that_is_shorter_differs() -> None:
    assert differences([{"kl": 2.0}] * 2, [{"kl": 2.0}]) == {"number of steps": 0.5}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ('{"step": 1, "rows": ["a-0", "b-0"]}\n', "byte-identical"),
        ('{"step": 1, "rows": ["b-0", "a-0"]}\n', "equal up to order"),
        ('{"step": 1, "rows": ["a-0", "c-0"]}\n', "different"),
    ],
)
def test_ledgers_are_compared_with_and_without_their_order(tmp_path: Path, other: str, said: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text('{"step": 1, "rows": ["a-0", "b-0"]}\n')
    second.write_text(other)
    assert compare_ledgers(first, second) == said
