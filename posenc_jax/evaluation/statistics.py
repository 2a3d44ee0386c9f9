"""Intervals: of ratios by the bootstrap over windows and seeds, of shares, and of the mean of a few repeats."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float


def ratio_interval(
    numerators: Float[np.ndarray, "W"], denominators: Float[np.ndarray, "W"], *, resamples: int
) -> tuple[float, float, float]:
    """Ratio of two sums over windows, and its 95 % percentile interval as windows are drawn anew.

    Every call with as many windows draws the same ones, so that intervals of different models and lengths are paired.
    NaN where nothing is to be divided by.
    """
    if not denominators.any():
        return math.nan, math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(numerators), size=(resamples, len(numerators)))
    sums = numerators[drawn].sum(axis=1), denominators[drawn].sum(axis=1)
    ratios = sums[0][sums[1] > 0] / sums[1][sums[1] > 0]  # windows that hold nothing may be all that is drawn
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(numerators.sum() / denominators.sum()), float(low), float(high)


def pooled_interval(
    numerators: Float[np.ndarray, "S W"], denominators: Float[np.ndarray, "S W"], *, resamples: int
) -> tuple[float, float, float]:
    """Ratio of two sums over seeds and windows, and its 95 % percentile interval as both are drawn anew.

    The windows are drawn alike for all seeds, which read the same ones, and S - 1 of the S seeds, with replacement: as
    few as S draws would make the interval too narrow, by a factor of sqrt((S - 1) / S) where seeds are all that differs
    (Rao and Wu 1988, section 2, m = n - 1). Still, three seeds say little about a fourth. Every call of one shape draws
    the same, so that intervals are paired; that of a difference is asked for by its numerators. With one seed it is
    `ratio_interval`.
    """
    seeds, windows = numerators.shape
    if seeds == 1:
        return ratio_interval(numerators[0], denominators[0], resamples=resamples)
    if not denominators.any():
        return math.nan, math.nan, math.nan
    rng = np.random.default_rng(0)
    drawn_windows = rng.integers(windows, size=(resamples, windows))
    drawn_seeds = rng.integers(seeds, size=(resamples, seeds - 1))

    def sums(values):
        by_seed = values[:, drawn_windows].sum(axis=2)  # [S, resamples]
        return np.take_along_axis(by_seed, drawn_seeds.T, axis=0).sum(axis=0)

    top, bottom = sums(numerators), sums(denominators)
    low, high = np.quantile(top[bottom > 0] / bottom[bottom > 0], [0.025, 0.975])
    return float(numerators.sum() / denominators.sum()), float(low), float(high)


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a probability, of which trials succeeded so often: Wilson 1927, right near 0 and 1 too."""
    z = statistics.NormalDist().inv_cdf(0.975)
    share, weight = successes / trials, z**2 / trials
    middle = share + weight / 2
    half = math.sqrt(weight * (share * (1 - share) + weight / 4))
    return max(0.0, (middle - half) / (1 + weight)), min(1.0, (middle + half) / (1 + weight))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean of two or more values that are taken for normal: Student's t."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return float(mean - half), float(mean + half)
