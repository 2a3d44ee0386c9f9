"""Intervals by the bootstrap over windows."""

import numpy as np
from jaxtyping import Float


def ratio_interval(
    numerators: Float[np.ndarray, "W"], denominators: Float[np.ndarray, "W"], *, resamples: int
) -> tuple[float, float, float]:
    """Ratio of two sums over windows, and its 95 % percentile interval as windows are drawn anew.

    Every call with as many windows draws the same ones, so that intervals of different models and lengths are paired.
    """
    drawn = np.random.default_rng(0).integers(len(numerators), size=(resamples, len(numerators)))
    ratios = numerators[drawn].sum(axis=1) / denominators[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(numerators.sum() / denominators.sum()), float(low), float(high)
