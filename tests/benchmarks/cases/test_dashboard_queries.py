import math
from collections.abc import Sequence

import pytest

from benchmarks.cases.dashboard_queries import Found, dashboard_queries, fill_in, is_sane, rows_of
from cluster.monitoring.metric_table import all_metrics

ACCURACY = 'max by (run) (ray_preceptor_held_out_accuracy{run=~"$run"})'
KL = 'max by (run) (ray_preceptor_kl{run=~"$run"})'
LOSS = 'max by (run) (ray_preceptor_loss{run=~"$run"})'


@pytest.mark.parametrize(
    ("query", "value", "sane"),
    [
        (ACCURACY, 1.0, True),
        (ACCURACY, 1.01, False),
        (KL, 12.0, True),
        (KL, -0.1, False),
        (KL, math.nan, False),
        (LOSS, -0.1, True),
        (LOSS, math.inf, False),
    ],
)
def test_a_figure_has_its_own_range(query: str, value: float, sane: bool) -> None:
    assert is_sane(query, value) is sane


def test_no_variable_of_grafana_is_left_in_a_query() -> None:
    assert len(dashboard_queries()) == len(all_metrics()) + 2  # the histogram has three lines
    assert not any("$" in fill_in(query) for query in dashboard_queries())


@pytest.mark.parametrize(("values", "met"), [([0.5], [True, True]), ([], [False, True]), ([0.5, 1.5], [True, False])])
def test_a_query_that_finds_nothing_or_nonsense_misses_a_bar(values: Sequence[float], met: list[bool]) -> None:
    rows = rows_of(Found({ACCURACY: values, KL: [0.1]}), "a run")
    assert [found["met"] for found in rows if "met" in found] == met
    assert any(ACCURACY in found["name"] for found in rows) is not all(met)
