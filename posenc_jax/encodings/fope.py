"""FoPE: rotary position embedding with a Fourier series of the position in place of one rate per pair."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from posenc_jax.encodings.base import Constant, Dims, Encoding
from posenc_jax.encodings.rotary import apply_rotary, cos_sin, head_frequencies
from posenc_jax.schema import NonNegative, Range


class FoPE(Encoding):
    r"""Fourier position embedding: each pair is rotated by a sum of waves, with its own rate as the main one.

    .. math:: R_t = \mathrm{diag}_m \begin{pmatrix} c_m(t) & -s_m(t) \\ s_m(t) & c_m(t) \end{pmatrix}, \quad
        c_m(t) = \sum_k A_{km} \cos(t\,\theta_k), \quad s_m(t) = \sum_k B_{km} \sin(t\,\theta_k)

    over the n rates theta_k = base^(-2k/d) radians per token that are at least 2 pi / L for a training length of L
    tokens. The other pairs are not rotated: c = 1, s = 0. A and B [K, n, n] belong to one layer. Each head of keys has
    its own, and its group of queries shares them. They are the identity plus normal noise with standard deviation
    gain / sqrt(n), and fixed unless `learned`. A gain of 0 is HoPE. FoPE is not relative: products of different waves,
    and so the logits, depend on more than i - j.

    Source: Hua et al. 2024, and the released code, whose gain for its smallest model is the default. Differs from the
    reference, which `faithful` reproduces, in three ways. There pairs that are not rotated have s = 1 as well as c = 1,
    which doubles their logits. At most d/4 pairs are rotated; if that is fewer than n, they have every ceil(n /
    (d/4))-th row of the identity. The noise is smaller, as its fans are those of all heads stacked, n d/4 and H d/4.
    """

    shared = False
    relative = False

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = field(default=10000.0, metadata={"alternative": 100.0})
        gain: NonNegative = 0.3  # of the noise
        learned: bool = False
        faithful: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        theta = theta[theta >= 2 * math.pi / dims.max_length]
        heads, rates = dims.num_kv_heads, len(theta)
        series = min(rates, dims.head_dim // 4) if config.faithful else rates
        fans = (rates * series + heads * series) if config.faithful else rates + series
        stddev = config.gain * math.sqrt(2 / max(fans, 1))
        main = main_rates(rates, series)
        self.inverse_frequencies = Constant(jnp.asarray(theta, jnp.float32))  # [n] radians per token
        self.cos_coefficients, self.sin_coefficients = (
            (nnx.Param if config.learned else Constant)(
                main + stddev * jax.random.normal(rngs.params(), (heads, rates, series), jnp.float32)
            )
            for _ in range(2)
        )
        self.still_sin = Constant(jnp.full((), float(config.faithful), jnp.float32))

    def rotate(self, q, k, q_pos, k_pos, ctx):
        return self._rotate(q, q_pos), self._rotate(k, k_pos)

    def _rotate(self, x: Float[Array, "B T H d"], positions: Real[Array, "#B T"]) -> Float[Array, "B T H d"]:
        cos, sin = (wave[:, :, 0] for wave in cos_sin(positions, self.inverse_frequencies[...]))
        cos = jnp.einsum("btn,knm->btkm", cos, self.cos_coefficients[...])
        sin = jnp.einsum("btn,knm->btkm", sin, self.sin_coefficients[...])
        still = [(0, 0)] * 3 + [(0, x.shape[-1] // 2 - cos.shape[-1])]
        cos, sin = jnp.pad(cos, still, constant_values=1), jnp.pad(sin, still, constant_values=self.still_sin[...])
        groups = x.shape[2] // cos.shape[2]
        return apply_rotary(x, jnp.repeat(cos, groups, axis=2), jnp.repeat(sin, groups, axis=2))


def main_rates(rates: int, series: int) -> Float[np.ndarray, "n m"]:
    """1 where a series has its main rate: the identity, or evenly spaced rows of it for fewer series than rates."""
    step = math.ceil(rates / max(series, 1))
    return (np.arange(rates)[:, None] == step * np.arange(series)).astype(np.float32)
