import math

import pytest

from cluster.contracts.metrics import Max, Mean, Quantile, Sum, merge, report


def test_parts_of_unequal_size_merge_to_the_mean_of_all_values() -> None:
    assert report(merge([{"x": Mean(6.0, 3)}, {"x": Mean(4.0, 1)}])) == {"x": 2.5}


def test_each_metric_merges_in_its_own_way() -> None:
    parts = [{"sum": Sum(1), "max": Max(5)}, {"sum": Sum(2), "max": Max(3)}]
    assert report(merge(parts)) == {"sum": 3, "max": 5}


def test_a_metric_that_only_one_part_has_is_kept() -> None:
    assert report(merge([{"a": Sum(1)}, {"b": Sum(2)}])) == {"a": 1, "b": 2}


def test_a_mean_of_nothing_is_nan() -> None:
    assert math.isnan(Mean(0.0, 0).value)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.99, 1.0])
def test_a_quantile_of_merged_parts_is_right_to_one_percent(fraction: float) -> None:
    values = [(-1) ** i * i**1.5 for i in range(1, 1001)]
    merged = merge([{"q": Quantile.of(fraction, values[:300])}, {"q": Quantile.of(fraction, values[300:])}])
    exact = sorted(values)[round(fraction * (len(values) - 1))]
    assert report(merged)["q"] == pytest.approx(exact, rel=0.02)


def test_a_quantile_of_zeros_is_zero() -> None:
    assert Quantile.of(0.5, [0.0, 0.0, 1e-12]).value == 0.0
