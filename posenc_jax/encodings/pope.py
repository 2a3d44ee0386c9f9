"""PoPE: polar coordinate positional embedding."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from posenc_jax.encodings.base import Constant, Dims, Encoding
from posenc_jax.encodings.rotary import cos_sin
from posenc_jax.schema import Range


class PoPE(Encoding):
    r"""Polar coordinate embedding: content sets the magnitude of each channel, and position sets its angle.

    .. math:: z_{ij} = \frac{1}{\sqrt{d}} \sum_c \mu(q_{ic})\, \mu(k_{jc}) \cos((j - i)\,\theta_c + \delta_c), \quad
        \mu(x) = \ln(1 + e^x), \quad \theta_c = base^{-c/d}, \quad c = 0 \dots d - 1

    A channel at angle a becomes the two channels (mu cos a, mu sin a). Queries and keys are then 2d wide, and their
    product takes twice the time and memory. Angles in radians, rates in radians per token. Learned, shared by the
    layers: delta [H, d], clamped to [-2 pi, 0], initially 0 ("zero") or drawn uniformly from that range ("uniform"). As
    in the reference, a delta outside of the range has no gradient. If it starts from "zero" and its first step goes up,
    it does not learn any more.

    Source: Gopalakrishnan et al. 2025, as in x-transformers. Differs from the reference: delta is subtracted from the
    angles of queries, not added to those of keys. The logits are the same, and query heads that share their keys have
    their own delta.
    """

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = 10000.0
        initial: Literal["zero", "uniform"] = "zero"  # delta

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = config.base ** (-np.arange(dims.head_dim, dtype=np.float64) / dims.head_dim)
        self.inverse_frequencies = Constant(jnp.asarray(theta, jnp.float32))  # [d] radians per token
        shape = (dims.num_heads, dims.head_dim)
        uniform = jax.random.uniform(rngs.params(), shape, jnp.float32, -2 * math.pi, 0)
        self.delta = nnx.Param(uniform if config.initial == "uniform" else jnp.zeros(shape, jnp.float32))

    def rotate(self, q, k, q_pos, k_pos, ctx):
        # Logits are divided by the square root of the width, which is 2d.
        q_magnitude = math.sqrt(2) * jax.nn.softplus(q.astype(jnp.float32))
        k_magnitude = jax.nn.softplus(k.astype(jnp.float32))
        q_cos, q_sin = cos_sin(q_pos, self.inverse_frequencies[...])
        delta = clamped(self.delta[...])
        cos, sin = jnp.cos(delta), jnp.sin(delta)
        q_cos, q_sin = q_cos * cos + q_sin * sin, q_sin * cos - q_cos * sin  # of the angle minus delta
        return (
            cartesian(q_magnitude, q_cos, q_sin).astype(q.dtype),
            cartesian(k_magnitude, *cos_sin(k_pos, self.inverse_frequencies[...])).astype(k.dtype),
        )


def cartesian(
    magnitude: Float[Array, "B T H d"], cos: Float[Array, "#B T #H d"], sin: Float[Array, "#B T #H d"]
) -> Float[Array, "B T H 2*d"]:
    """Polar coordinates as pairs of channels (c, c + d)."""
    return jnp.concatenate([magnitude * cos, magnitude * sin], axis=-1)


def clamped(delta: Float[Array, "H d"]) -> Float[Array, "H d"]:
    """Delta within [-2 pi, 0]. Its gradient is 1 on the bounds, where jnp.clip has 1/2, and 0 beyond them."""
    inside = (delta >= -2 * math.pi) & (delta <= 0)
    return jnp.where(inside, delta, jnp.clip(jax.lax.stop_gradient(delta), -2 * math.pi, 0))
