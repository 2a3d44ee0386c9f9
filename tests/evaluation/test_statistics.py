"""Intervals: coverage with correlated windows, pairing, ranks without differences, and published reference values."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from posenc_jax.evaluation import statistics
from posenc_jax.evaluation.statistics import differences_to_first, ratio_interval


def alone(count):
    """Documents for windows that each belong to a different document."""
    return [f"document {i:05}" for i in range(count)]


def in_documents(*sizes):
    return [f"document {i}" for i, size in enumerate(sizes) for _ in range(size)]


def test_value_is_the_ratio_of_sums_not_the_mean_of_ratios():
    found = ratio_interval(np.array([1.0, 9.0]), np.array([1.0, 3.0]), alone(2), resamples=100)
    assert found[0] == pytest.approx(2.5)


def covered(documents, *, by_windows=False, effect, noise, samples=400):
    """How often the interval contains the true mean of 5, for windows that share a document effect."""
    rng, hits = np.random.default_rng(0), 0
    names, own = np.unique(documents, return_inverse=True)
    given = alone(len(documents)) if by_windows else documents
    for _ in range(samples):
        windows = 5 + rng.normal(0, effect, len(names))[own] + rng.normal(0, noise, len(documents))
        _, low, high = ratio_interval(windows, np.ones(len(windows)), given, resamples=400)
        hits += low <= 5 <= high
    return hits / samples


@pytest.mark.parametrize("sizes", [(3,) * 20, (2,) * 6, (1,) * 60], ids=["20 documents", "6", "60 of one window"])
def test_intervals_cover_the_truth_95_times_in_100(sizes):
    assert covered(in_documents(*sizes), effect=2, noise=1) == pytest.approx(0.95, abs=0.025)


def test_windows_drawn_as_if_independent_cover_it_far_less_often():
    documents = in_documents(*(5,) * 13)
    assert covered(documents, effect=2, noise=1) == pytest.approx(0.95, abs=0.025)
    assert covered(documents, effect=2, noise=1, by_windows=True) < 0.75


@pytest.mark.parametrize("sizes", [(5, 1, 3, 2) * 8, (1, 4) * 6])
def test_intervals_are_those_of_explicit_loops(sizes):
    documents, rng = in_documents(*sizes), np.random.default_rng(3)
    nats, count = rng.gamma(4, 1, len(documents)), rng.integers(50, 90, len(documents)).astype(float)
    nats *= count * np.repeat(rng.gamma(9, 1 / 9, len(sizes)), sizes)  # documents have different sizes
    windows, D = (
        [[i for i, name in enumerate(documents) if name == own] for own in dict.fromkeys(documents)],
        len(sizes),
    )
    draws = []
    for _ in range(6000):
        drawn = [i for document in rng.integers(D, size=D - 1) for i in windows[document]]
        draws.append(nats[drawn].sum() / count[drawn].sum())
    held = np.array([count[own].sum() for own in windows])
    tail = 100 * scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, held.sum() ** 2 / (held**2).sum() - 1))
    value, low, high = ratio_interval(nats, count, documents, resamples=6000)
    assert value == pytest.approx(nats.sum() / count.sum())
    assert (low, high) == pytest.approx(np.percentile(draws, [tail, 100 - tail]), rel=0.03)


def test_intervals_have_the_width_of_scipys_bootstrap_of_documents():
    documents, rng = in_documents(*(1, 2, 3) * 20), np.random.default_rng(4)
    nats, count = rng.normal(5, 2, 120), rng.integers(1, 4, 120).astype(float)
    _, own = np.unique(documents, return_inverse=True)
    theirs = scipy.stats.bootstrap(
        (np.bincount(own, nats), np.bincount(own, count)),
        lambda top, bottom, axis: top.sum(axis=axis) / bottom.sum(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        rng=0,
    ).confidence_interval
    _, low, high = ratio_interval(nats, count, documents, resamples=5000)
    wider = np.sqrt(60 / 59) * scipy.stats.t.ppf(0.975, 59) / scipy.stats.norm.ppf(0.975)
    assert high - low == pytest.approx(wider * (theirs.high - theirs.low), rel=0.04)


def test_one_document_has_no_interval():
    ones, several = np.ones(8), np.random.default_rng(0).normal(5, 2, 8)
    assert ratio_interval(several, ones, ["a"] * 8, resamples=100)[1:] == (None, None)
    assert ratio_interval(np.stack([several, several]), np.ones((2, 8)), ["a"] * 8, resamples=100)[1:] == (None, None)
    counted = np.array([1.0, 1, 0, 0])  # the second document has zero counts
    assert ratio_interval(counted, counted, ["a", "a", "b", "b"], resamples=100) == (1.0, None, None)
    assert differences_to_first(np.ones((2, 1, 8)), np.ones((2, 1, 8)), ["a"] * 8, resamples=100)[1][1] is None


def test_documents_are_drawn_alike_each_time():
    rng = np.random.default_rng(1)
    a, noise = rng.normal(5, 2, 64), rng.normal(0, 0.01, 64)
    _, low_a, high_a = ratio_interval(a, np.ones(64), alone(64), resamples=500)
    _, low_b, high_b = ratio_interval(a + noise, np.ones(64), alone(64), resamples=500)
    assert abs(low_a - low_b) < 0.01
    assert abs(high_a - high_b) < 0.01


def test_a_constant_has_no_width():
    assert ratio_interval(np.full(8, 3.0), np.ones(8), alone(8), resamples=100) == (3.0, 3.0, 3.0)


def test_intervals_over_seeds_have_the_width_of_both_seeds_and_documents():
    """For normal effects of seed and document, the variance of the mean is known: s²/S + d²/D."""
    rng = np.random.default_rng(0)
    S, D, s, d = 8, 40, 0.3, 2.0
    widths = []
    for _ in range(40):
        sample = 5 + rng.normal(0, s, (S, 1)) + rng.normal(0, d, (1, D))
        _, low, high = ratio_interval(sample, np.ones((S, D)), alone(D), resamples=400)
        widths.append(high - low)
    expected = 2 * scipy.stats.t.ppf(0.975, D - 1) * np.sqrt(s**2 / S + d**2 / D)
    assert np.mean(widths) == pytest.approx(expected, rel=0.07)


def test_three_seeds_that_are_all_that_differs_give_an_interval_of_their_standard_error():
    values = np.array([1.0, 2.0, 4.0])
    _, low, high = ratio_interval(np.tile(values[:, None], 10), np.ones((3, 10)), alone(10), resamples=4000)
    assert (low, high) == (1.0, 4.0)  # two of three seeds are drawn; the extremes are 1 + 1 and 4 + 4
    drawn = [(a + b) / 2 for a in values for b in values]
    assert np.var(drawn) == pytest.approx(np.var(values, ddof=1) / 3)  # the variance over all draws is s²/S


def test_of_four_seeds_three_are_drawn():
    """By counting draws of seeds: the mean of 3 draws is -3 in 1 of 64 cases, and at most -7/3 in 4 of 64 cases."""
    seeds = np.tile(np.array([-3.0, -1.0, 1.0, 3.0])[:, None], 60)
    _, low, high = ratio_interval(seeds, np.ones((4, 60)), alone(60), resamples=4000)
    assert (low, high) == pytest.approx((-7 / 3, 7 / 3))


def test_seeds_that_agree_by_chance_do_not_give_a_pair_a_narrow_interval():
    rng = np.random.default_rng(9)
    documents, seed_noise = rng.normal(0, 0.001, (4, 1, 30)), rng.normal(0, 0.1, (4, 3, 1))
    seed_noise[1] = seed_noise[0]  # two curves that differ only by documents
    curves = 5 + documents + seed_noise
    found = differences_to_first(curves, np.ones_like(curves), alone(30), resamples=500)
    assert found[1][2] - found[1][1] > 0.1


def test_differences_over_seeds_are_paired():
    rng = np.random.default_rng(1)
    a = rng.normal(5, 2, (3, 64)) + rng.normal(0, 1, (3, 1))
    ones, documents = np.ones((3, 64)), in_documents(*(4,) * 16)
    _, low, high = ratio_interval(a + 0.25 - a, ones, documents, resamples=500)
    assert (low, high) == pytest.approx((0.25, 0.25))
    assert ratio_interval(a, ones, documents, resamples=500) == ratio_interval(a, ones, documents, resamples=500)


def test_one_seed_has_the_interval_over_documents_alone():
    values, documents = np.random.default_rng(2).normal(5, 2, 64), in_documents(*(2,) * 32)
    one = ratio_interval(values[None], np.ones((1, 64)), documents, resamples=300)
    assert one == ratio_interval(values, np.ones(64), documents, resamples=300)


def equal_curves(rng, documents, curves=10, seeds=3):
    """Losses of curves that differ only by chance, with effects of documents, windows and seeds, as in a study."""
    names, own = np.unique(documents, return_inverse=True)
    easy = rng.normal(0, 3, len(documents))  # some text is easier for all curves
    apart = rng.normal(0, 1, (curves, 1, len(names)))[..., own] + rng.normal(0, 0.5, (curves, 1, len(documents)))
    found = 5 + easy + apart + rng.normal(0, 0.15, (curves, seeds, 1))
    return found[np.argsort(found.mean(axis=(1, 2)))]  # the best curve first


def test_of_equal_curves_one_is_found_behind_the_best_5_times_in_100_and_by_plain_intervals_mostly():
    rng, documents = np.random.default_rng(0), in_documents(*(4, 1, 2) * 8)
    together, plain, samples = 0, 0, 150
    for _ in range(samples):
        curves = equal_curves(rng, documents)
        ones = np.ones_like(curves)
        intervals = differences_to_first(curves, ones, documents, resamples=400)
        together += any(low > 0 for _, low, _ in intervals[1:])
        apart = (ratio_interval(own - curves[0], ones[0], documents, resamples=400) for own in curves[1:])
        plain += any(low > 0 for _, low, _ in apart)
    assert 0.01 < together / samples < 0.09
    assert plain / samples > 0.4


def test_orders_are_found_where_curves_differ():
    rng, documents = np.random.default_rng(0), in_documents(*(4, 1, 2) * 8)
    curves = equal_curves(rng, documents, curves=5)
    curves[3:] += 5
    found = differences_to_first(curves, np.ones_like(curves), documents, resamples=400)
    assert found[0] == (0.0, 0.0, 0.0)
    assert [low > 0 for _, low, _ in found] == [False, False, False, True, True]
    for (value, low, high), own in zip(found, curves, strict=True):
        assert value == pytest.approx(own.mean() - curves[0].mean())
        assert (low + high) / 2 == pytest.approx(value)


def test_two_curves_have_the_interval_of_their_difference():
    """With one pair, the maximum deviation over pairs is the deviation of this pair."""
    rng, documents = np.random.default_rng(5), alone(40)
    curves = rng.normal(5, 1, (2, 1, 40))
    (_, (value, low, high)) = differences_to_first(curves, np.ones_like(curves), documents, resamples=4000)
    plain = ratio_interval(curves[1] - curves[0], np.ones((1, 40)), documents, resamples=4000)
    assert value == pytest.approx(plain[0])
    assert high - low == pytest.approx(plain[2] - plain[1], rel=0.05)


def test_curves_that_are_equal_to_the_last_bit_have_no_width_and_do_not_disturb_the_others():
    rng, documents = np.random.default_rng(6), alone(30)
    a, b = rng.normal(5, 1, (2, 1, 30))
    ones = np.ones((3, 1, 30))
    found = differences_to_first(np.stack([a, a, b]), ones, documents, resamples=500)
    assert found[1] == (0.0, 0.0, 0.0)
    assert 0 < found[2][2] - found[2][1] < 2


def test_pairs_are_compared_over_the_seeds_that_both_have():
    rng, documents = np.random.default_rng(7), alone(30)
    text = rng.normal(0, 1, 30)
    first, second = (
        np.stack([level + text + rng.normal(0, 0.01, 30) for level in levels]) for levels in ((2, 9), (3, 4))
    )
    counts = np.ones((2, 2, 30))
    counts[0, 1] = 0  # the first curve lacks seed 1
    (_, (value, low, high)) = differences_to_first(np.stack([first, second]), counts, documents, resamples=200)
    assert value == pytest.approx(1, abs=0.01)
    assert low < value < high
    counts[1, 0] = 0
    (_, (value, low, _)) = differences_to_first(np.stack([first, second]), counts, documents, resamples=200)
    assert np.isnan(value)
    assert low is None


def test_every_pair_is_within_the_intervals_of_the_first_whichever_comes_first():
    """The interval of a pair is the same from both sides."""
    curves, documents = np.random.default_rng(8).normal(5, 1, (4, 2, 30)), alone(30)
    for i, j in itertools.permutations(range(4), 2):
        order = [i, j, *(k for k in range(4) if k not in (i, j))]
        found = differences_to_first(curves[order], np.ones((4, 2, 30)), documents, resamples=300)[1]
        order[:2] = j, i
        back = differences_to_first(curves[order], np.ones((4, 2, 30)), documents, resamples=300)[1]
        assert found == pytest.approx((-back[0], -back[2], -back[1]))


def test_a_deviation_beyond_all_probability_has_an_infinite_half_width_and_not_a_negative_one():
    ratios = 1 + 0.01 * np.random.default_rng(0).normal(size=(1, 1000))
    assert statistics._half_widths(ratios, np.zeros(1), np.zeros(1), 5.3).tolist() == [math.inf]
