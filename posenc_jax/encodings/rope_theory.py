"""Theory of RoPE's base: how far a model can read that was trained, or tuned, with it.

theta_m = base^(-2m/d) radians per token, m = 0 .. d/2 - 1, where d is the rotated width. Lengths are in tokens.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from posenc_jax.encodings import frequencies

BASES = tuple(np.geomspace(1e2, 1e9, 1600))  # where `smallest_base` looks: steps of 1 %


def critical_dimension(head_dim: int, base: float, length: int) -> int:
    """Channels whose pairs turn at least once in training ("d_extra"). The others meet new angles past its length.

    2 ceil(d/2 log_base(L / 2 pi)), from 0 (no pair turns once) to d. Source: Liu et al. 2023, "Scaling laws of
    RoPE-based extrapolation".
    """
    return min(max(2 * math.ceil(frequencies.pair_index(head_dim, base, length, turns=1)), 0), head_dim)


def extrapolation_bound(
    head_dim: int, base: float, length: int, tuned_base: float | None = None, tuned_length: int | None = None
) -> float:
    """Tokens that a model reads well ("T_extra") after training and, optionally, tuning with another base or length.

    With d_extra the critical dimension of training, it is 2 pi tuned_base^(d_extra / d) if `tuned_base` is at least
    base^(log_{L/2pi}(L'/2pi)). At that base the slowest of these channels turn just once in `tuned_length` L'. For
    smaller bases it is `tuned_length`. Source: Liu et al. 2023, theorem on extrapolation with larger bases.
    """
    tuned_base, tuned_length = tuned_base or base, tuned_length or length
    least = base ** math.log(tuned_length / (2 * math.pi), length / (2 * math.pi))
    if tuned_base < least:
        return float(tuned_length)
    return 2 * math.pi * tuned_base ** (critical_dimension(head_dim, base, length) / head_dim)


def small_bases(length: int) -> tuple[float, float, float]:
    """The bases below which every pair turns by pi/2, by pi and by 2 pi within `length` L.

    2 L/pi, L/pi and L/2pi. The smaller the base, the fewer new angles there are past that length. Source: Liu et al.
    2023, on smaller bases.
    """
    return 2 * length / math.pi, length / math.pi, length / (2 * math.pi)


def similarity(head_dim: int, base: float, distances: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """B_m = sum over pairs of cos(m theta): how much more a query attends to an equal key than to a random one.

    Source: Men et al. 2024, "Base of RoPE bounds context length". `smallest_base` does not reproduce the paper's table
    (d = 128) exactly. It gives 0.73 to 1.07 times its values for 1,024 to 32,768 tokens, and 1.22 times for 65,536. For
    example, the paper has 2.7e4 for 4,096 tokens, but B_m is then negative at m = 4,079.
    """
    theta, _ = frequencies.none(head_dim, base, 0)
    return np.cos(distances[:, None] * theta).sum(axis=1)


def attended_distance(head_dim: int, base: float, longest: int) -> int:
    """The largest distance, at most `longest`, such that B_m >= 0 at every m up to it. Source: see `similarity`."""
    negative = similarity(head_dim, base, np.arange(longest + 1)) < 0
    return int(negative.argmax()) - 1 if negative.any() else longest


def smallest_base(head_dim: int, length: int, bases: Sequence[float] = BASES) -> float | None:
    """The first of these bases for which B_m >= 0 at every distance m up to `length`; None if there is none.

    It is not a threshold: B_m < 0 again for some larger bases. The first range of bases for which it holds may be
    narrower than the steps between `bases`. The result falls steeply as heads get wider. Source: see `similarity`.
    """
    distances = np.arange(length + 1)
    return next((base for base in bases if similarity(head_dim, base, distances).min() >= 0), None)
