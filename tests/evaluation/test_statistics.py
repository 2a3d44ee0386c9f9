"""Intervals: coverage, pairing and the ratio of sums of the bootstrap; published values of the others."""

import numpy as np
import pytest

from posenc_jax.evaluation.statistics import mean_interval, pooled_interval, ratio_interval, wilson_interval


def test_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    assert ratio_interval(np.array([1.0, 9.0]), np.array([1.0, 3.0]), resamples=100)[0] == pytest.approx(2.5)


def test_interval_covers_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        sample = rng.normal(5.0, 2.0, 60)
        _, low, high = ratio_interval(sample, np.ones(60), resamples=400)
        hits += low <= 5.0 <= high
    assert 0.90 < hits / 300 < 0.985


def test_windows_are_drawn_alike_each_time():
    rng = np.random.default_rng(1)
    a, noise = rng.normal(5, 2, 64), rng.normal(0, 0.01, 64)
    ones = np.ones(64)
    _, low_a, high_a = ratio_interval(a, ones, resamples=500)
    _, low_b, high_b = ratio_interval(a + noise, ones, resamples=500)
    assert abs(low_a - low_b) < 0.01
    assert abs(high_a - high_b) < 0.01


def test_a_constant_has_no_width():
    assert ratio_interval(np.full(8, 3.0), np.ones(8), resamples=100) == (3.0, 3.0, 3.0)


def test_wilson_intervals_are_those_of_the_formula():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_interval_of_a_mean_is_students():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_pooled_intervals_have_the_width_of_both_seeds_and_windows():
    """Of normal effects of seed and window the variance of the mean is known: s²/S + w²/W."""
    rng = np.random.default_rng(0)
    S, W, s, w = 8, 40, 0.3, 2.0
    widths = []
    for _ in range(40):
        sample = 5 + rng.normal(0, s, (S, 1)) + rng.normal(0, w, (1, W))
        _, low, high = pooled_interval(sample, np.ones((S, W)), resamples=400)
        widths.append(high - low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(s**2 / S + w**2 / W), rel=0.07)


def test_three_seeds_that_are_all_that_differs_give_an_interval_of_their_standard_error():
    values = np.array([1.0, 2.0, 4.0])
    _, low, high = pooled_interval(np.tile(values[:, None], 10), np.ones((3, 10)), resamples=4000)
    assert (low, high) == (1.0, 4.0)  # two of three are drawn: 1 + 1 and 4 + 4 at the ends
    drawn = [(a + b) / 2 for a in values for b in values]
    assert np.var(drawn) == pytest.approx(np.var(values, ddof=1) / 3)  # that of all draws: s²/S, not less


def test_pooled_differences_are_paired():
    rng = np.random.default_rng(1)
    a = rng.normal(5, 2, (3, 64)) + rng.normal(0, 1, (3, 1))
    ones = np.ones((3, 64))
    _, low, high = pooled_interval(a + 0.25 - a, ones, resamples=500)
    assert (low, high) == pytest.approx((0.25, 0.25))
    assert pooled_interval(a, ones, resamples=500) == pooled_interval(a, ones, resamples=500)


def test_one_seed_has_the_interval_over_windows():
    values = np.random.default_rng(2).normal(5, 2, 64)
    one = pooled_interval(values[None], np.ones((1, 64)), resamples=300)
    assert one == ratio_interval(values, np.ones(64), resamples=300)
