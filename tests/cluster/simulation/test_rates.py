import numpy as np
import pytest

from cluster.simulation.rates import LogNormal, sample_lengths, seconds_per_token


def test_a_curve_is_followed_between_its_points_and_beyond_the_last() -> None:
    curve = [(1, 1.0), (4, 2.5), (8, 3.5)]
    assert [seconds_per_token(curve, running) for running in (1, 2, 4, 6, 8, 12)] == [1.0, 1.5, 2.5, 3.0, 3.5, 4.5]


def test_below_the_first_point_and_with_one_point_the_pace_stays() -> None:
    assert seconds_per_token([(4, 2.0), (8, 3.0)], 1) == 2.0
    assert seconds_per_token([(4, 2.0)], 100) == 2.0


def test_quantiles_are_lengths_at_equal_distances() -> None:
    lengths = sample_lengths([10.0, 20.0, 100.0], 20_000, np.random.default_rng(0))
    assert (min(lengths), max(lengths)) == (10, 100)
    assert np.median(lengths) == pytest.approx(20, abs=1)
    # Half lie evenly between 10 and 20, half between 20 and 100.
    assert np.mean(lengths) == pytest.approx((15 + 60) / 2, rel=0.02)


def test_log_normal_lengths_have_their_median_and_end_at_the_longest() -> None:
    lengths = sample_lengths(LogNormal(100.0, 1.0, 500), 20_000, np.random.default_rng(0))
    assert np.median(lengths) == pytest.approx(100, rel=0.03)
    assert max(lengths) == 500


def test_few_lengths_have_almost_the_mean_of_the_distribution_and_none_comes_twice_from_one_part() -> None:
    lengths = sample_lengths([0.0, 1000.0], 100, np.random.default_rng(0))
    assert sorted(length // 10 for length in lengths) == pytest.approx(range(100), abs=1)
    assert np.mean(lengths) == pytest.approx(500, abs=1)  # independent ones would miss it by 29 on average
    assert lengths != sorted(lengths)
