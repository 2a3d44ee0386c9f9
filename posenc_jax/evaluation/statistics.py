"""Intervals of ratios and of their differences, by the bootstrap over documents and seeds."""

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri, stdtrit  # importing scipy.stats takes half a second

Interval = tuple[float, float | None, float | None]  # a value, and the ends of its 95 % interval if it has one


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share of successes in independent trials (Wilson 1927)."""
    z = float(ndtri(0.975))
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def ratio_interval(
    numerators: Float[np.ndarray, "*S W"],
    denominators: Float[np.ndarray, "*S W"],
    documents: Sequence[str],
    *,
    resamples: int,
) -> Interval:
    """Ratio of two sums over windows, and over seeds if there are any, with its 95 % interval.

    The bootstrap draws documents, not windows (cluster bootstrap). The windows of a document are similar, so drawing
    windows would make the interval too narrow. `documents` names the document of each of the W windows. All seeds read
    the same windows, so the same documents are drawn for all seeds. A draw has S - 1 of the S seeds and D - 1 of the D
    documents, with replacement. Drawing D documents would make the interval too narrow, by a factor of
    sqrt((D - 1) / D) (Rao and Wu 1988, section 2, m = n - 1). The same holds for seeds.

    The ends are percentiles further out than 2.5 and 97.5: Student's t replaces the normal distribution (the expanded
    percentile interval of Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). Its degrees of freedom are
    the effective number of documents minus one. The effective number is Kish's (sum b)^2 / sum b^2, where b are the
    denominators of the documents. Seeds have no such correction: three seeds say little about a fourth.

    All calls with the same shape use the same draws, so intervals are paired. For the interval of a difference, pass
    the difference of the numerators. There is no interval if one document holds the whole denominator. The value is NaN
    if the denominator is 0.
    """
    top, bottom = (_by_document(np.atleast_2d(values), documents) for values in (numerators, denominators))
    if not bottom.any():
        return math.nan, math.nan, math.nan
    value = float(top.sum() / bottom.sum())
    if np.count_nonzero(bottom.any(axis=0)) == 1:
        return value, None, None
    ratios = _resampled(top, bottom, resamples)
    outside = ndtr(stdtrit(_freedom(bottom), 0.025))
    low, high = np.quantile(ratios[np.isfinite(ratios)], [outside, 1 - outside])
    return value, float(low), float(high)


def perplexity_interval(
    nats: Float[np.ndarray, "*S W"], tokens: Float[np.ndarray, "*S W"], documents: Sequence[str], *, resamples: int
) -> Interval:
    """exp of the `ratio_interval` of nats and tokens."""
    value, *ends = ratio_interval(nats, tokens, documents, resamples=resamples)
    low, high = (None if end is None else float(np.exp(end)) for end in ends)
    return float(np.exp(value)), low, high


def differences_to_first(
    numerators: Float[np.ndarray, "C S W"],
    denominators: Float[np.ndarray, "C S W"],
    documents: Sequence[str],
    *,
    resamples: int,
) -> list[Interval]:
    """The difference of each of C curves to the first, with 95 % intervals that hold for all pairs of curves at once.

    So the first curve may be the best one on these same windows: the coverage also holds for a pair that was chosen by
    its outcome. The half width is the standard error of the pair times a critical value. The critical value is the 95th
    percentile of the largest deviation over all pairs, in units of their standard errors, on the draws of
    `ratio_interval` (single-step max-t over all pairs, as Tukey's: Westfall and Young 1993; Hothorn, Bretz and Westfall
    2008).

    There are two corrections. First, the critical value is replaced by that of Student's t at the same level, with the
    degrees of freedom of `ratio_interval`. Second, the part of a pair's variance that comes from seeds is raised to the
    median of all pairs if it is smaller, because few seeds often make it far too small by chance (as with few
    microarrays: Tusher, Tibshirani and Chu 2001). With three seeds, the intervals are valid if most of the variance
    comes from documents, and too narrow if most comes from seeds.

    A curve has no measurement for seeds whose denominators are 0. A pair is compared over the seeds that both curves
    have. The difference is NaN if there are none.
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
    to_first = len(tops) - 1  # the pairs with the first curve come first
    for value, width in zip(map(float, apart[:to_first]), map(float, half[:to_first]), strict=True):
        found.append((value, None, None) if math.isnan(width) else (value, value - width, value + width))
    return found


def _half_widths(
    ratios: Float[np.ndarray, "P R"],
    values: Float[np.ndarray, "P"],
    seed_variances: Float[np.ndarray, "P"],
    freedom: float,
) -> Float[np.ndarray, "P"]:
    """Half widths of intervals that hold for all pairs at once in 95 % of the draws. NaN for pairs without draws."""
    variances = np.array([_variance(own) for own in ratios])
    half, differing = np.sqrt(variances), variances > 0  # 0 if a scaling rule changes nothing
    if differing.any():
        of_seeds = seed_variances[differing]
        errors = np.sqrt(variances[differing] + np.maximum(0, np.median(of_seeds) - of_seeds))
        deviations = np.abs(ratios[differing] - values[differing, None]) / errors[:, None]
        largest = np.fmax.reduce(deviations, axis=0)  # ignores pairs that the draw has no ratio for
        critical = np.quantile(largest[np.isfinite(largest)], 0.95)
        half[differing] = abs(stdtrit(freedom, ndtr(-critical))) * errors  # stdtrit(freedom, 0) is +inf, not -inf
    return half


def _variance(ratios: Float[np.ndarray, "R"]) -> float:
    """The variance over the draws that have a ratio. NaN if there are none."""
    drawn = ratios[np.isfinite(ratios)]
    return float(np.var(drawn)) if drawn.size else math.nan


def _freedom(denominators: Float[np.ndarray, "S D"]) -> float:
    """Degrees of freedom: the effective number of documents minus one, at least 1."""
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
    """The ratio in each draw of documents and seeds. NaN if the denominator of the draw is 0."""
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
