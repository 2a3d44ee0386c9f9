"""Intervals: of ratios by the bootstrap over windows, of shares, and of the mean of a few repeats."""

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
