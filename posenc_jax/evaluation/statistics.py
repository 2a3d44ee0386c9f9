"""Intervals of ratios, and of their differences, by the bootstrap over documents and seeds."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float

Interval = tuple[float, float | None, float | None]  # a value, and the ends of its 95 % interval where it has one


def ratio_interval(
    numerators: Float[np.ndarray, "*S W"],
    denominators: Float[np.ndarray, "*S W"],
    documents: Sequence[str],
    *,
    resamples: int,
) -> Interval:
    """Ratio of two sums over windows, and over seeds if there are any, with its 95 % interval.

    The bootstrap draws documents, not windows: the windows of a document are alike, and would make the interval too
    narrow if they were drawn one by one (cluster bootstrap). `documents` names the document of each of the W windows.
    All seeds read the same windows, so the same documents are drawn for all. Of S seeds S - 1 are drawn, and of D
    documents D - 1, with replacement: as many as there are would make the interval too narrow, by a factor of
    sqrt((D - 1) / D) (Rao and Wu 1988, section 2, m = n - 1). The ends are percentiles further out than 2.5 and 97.5,
    by Student's t in place of the normal distribution (the expanded percentile interval of Hesterberg 2015, "What
    Teachers Should Know About the Bootstrap"). Its degrees of freedom are the effective number of documents minus one,
    where documents count by their share of the denominators (Kish's (sum b)^2 / sum b^2). Seeds have no such
    correction: three seeds say little about a fourth.

    Every call of one shape draws the same, so intervals are paired. The interval of a difference is that of the
    difference of the numerators. There is no interval where one document holds all that counts, and the value is NaN
    where there is nothing to divide by.
    """
    top, bottom = (_by_document(np.atleast_2d(values), documents) for values in (numerators, denominators))
    if not bottom.any():
        return math.nan, math.nan, math.nan
    value = float(top.sum() / bottom.sum())
    if np.count_nonzero(bottom.any(axis=0)) == 1:
        return value, None, None
    ratios = _resampled(top, bottom, resamples)
    outside = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, _freedom(bottom)))
    low, high = np.quantile(ratios[np.isfinite(ratios)], [outside, 1 - outside])
    return value, float(low), float(high)


def differences_to_first(
    numerators: Float[np.ndarray, "C S W"],
    denominators: Float[np.ndarray, "C S W"],
    documents: Sequence[str],
    *,
    resamples: int,
) -> list[Interval]:
    """The difference of each of C curves to the first, with 95 % intervals that hold for all pairs of curves at once.

    So the first may be the curve that was best on these same windows: no choice of a pair by its outcome makes one of
    the intervals miss more often. A half width is the standard error of the pair times one critical value, the 95th
    percentile of the largest deviation over all pairs in units of their standard errors, on the same draws as in
    `ratio_interval` (single-step max-t over all pairs, as Tukey's: Westfall and Young 1993; Hothorn, Bretz and Westfall
    2008). Two corrections: the critical value is that of Student's t at the same level, with the degrees of freedom of
    `ratio_interval`. And where the seeds' part of a pair's variance is below the median of all pairs, the median is
    taken, since few seeds often make it far too small by chance (as with few microarrays: Tusher, Tibshirani and Chu
    2001). With three seeds the intervals hold where documents are most of the variance, and are too narrow where seeds
    are.

    A curve lacks the seeds in which its denominators are 0. A pair is compared over the seeds that both have, and is
    NaN where there are none.
    """
    tops, bottoms = (_by_document(values, documents) for values in (numerators, denominators))
    apart, ratios, seed_variances = [], [], []
    for first, other in itertools.combinations(range(len(tops)), 2):
        shared = (bottoms[first] > 0) & (bottoms[other] > 0)
        top, bottom = np.where(shared, tops[other] - tops[first], 0), np.where(shared, bottoms[other], 0)
        apart.append(top.sum() / bottom.sum() if bottom.any() else math.nan)
        several = np.count_nonzero(bottom.any(axis=0)) > 1
        ratios.append(_resampled(top, bottom, resamples) if several else np.full(resamples, math.nan))
        of_seeds = _resampled(top.sum(axis=1, keepdims=True), bottom.sum(axis=1, keepdims=True), resamples)
        seed_variances.append(_variance(of_seeds))
    if not apart:
        return [(0.0, 0.0, 0.0)]
    half = _half_widths(np.array(ratios), np.array(apart), np.array(seed_variances), _freedom(bottoms.max(axis=0)))
    found: list[Interval] = [(0.0, 0.0, 0.0)]
    to_first = len(tops) - 1  # pairs of the first come first
    for value, width in zip(map(float, apart[:to_first]), map(float, half[:to_first]), strict=True):
        found.append((value, None, None) if math.isnan(width) else (value, value - width, value + width))
    return found


def _half_widths(
    ratios: Float[np.ndarray, "P R"],
    values: Float[np.ndarray, "P"],
    seed_variances: Float[np.ndarray, "P"],
    freedom: float,
) -> Float[np.ndarray, "P"]:
    """Half widths that cover all pairs at once in 95 % of the draws. NaN for pairs without draws."""
    variances = np.array([_variance(own) for own in ratios])
    half, differing = np.sqrt(variances), variances > 0  # curves are equal where a scaling rule changes nothing
    if differing.any():
        of_seeds = seed_variances[differing]
        errors = np.sqrt(variances[differing] + np.maximum(0, np.median(of_seeds) - of_seeds))
        deviations = np.abs(ratios[differing] - values[differing, None]) / errors[:, None]
        largest = np.fmax.reduce(deviations, axis=0)  # of those that the draw has
        critical = np.quantile(largest[np.isfinite(largest)], 0.95)
        half[differing] = -scipy.stats.t.ppf(scipy.stats.norm.sf(critical), freedom) * errors
    return half


def _variance(ratios: Float[np.ndarray, "R"]) -> float:
    """The variance of the draws that have a ratio. NaN if none has."""
    drawn = ratios[np.isfinite(ratios)]
    return float(np.var(drawn)) if drawn.size else math.nan


def _freedom(denominators: Float[np.ndarray, "S D"]) -> float:
    """Degrees of freedom from the documents, at least 1."""
    shares = denominators.sum(axis=0) / denominators.sum()
    return float(max(1 / (shares**2).sum() - 1, 1))


def _by_document(values: Float[np.ndarray, "*C W"], documents: Sequence[str]) -> Float[np.ndarray, "*C D"]:
    """Sums over the windows of each document."""
    names, own = np.unique(documents, return_inverse=True)
    sums = np.zeros((len(names), *values.shape[:-1]))
    np.add.at(sums, own, np.moveaxis(values, -1, 0))
    return np.moveaxis(sums, 0, -1)


def _resampled(
    top: Float[np.ndarray, "S D"], bottom: Float[np.ndarray, "S D"], resamples: int
) -> Float[np.ndarray, "resamples"]:
    """The ratio in each draw of documents and seeds. NaN if the draw has no denominator."""
    seeds, documents = _draws(*top.shape, resamples)
    above, below = (((seeds @ values) * documents).sum(axis=1) for values in (top, bottom))
    return np.divide(above, below, out=np.full(resamples, math.nan), where=below > 0)


@functools.lru_cache(maxsize=4)
def _draws(
    seeds: int, documents: int, resamples: int
) -> tuple[Float[np.ndarray, "resamples S"], Float[np.ndarray, "resamples D"]]:
    """How often each seed and each document is drawn."""
    rng = np.random.default_rng(0)
    counts = [rng.multinomial(max(n - 1, 1), np.full(n, 1 / n), size=resamples) for n in (documents, seeds)]
    return counts[1].astype(np.float64), counts[0].astype(np.float64)
