"""xPos: rotary position embedding with a decay."""

from dataclasses import dataclass
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from posenc_jax.encodings.base import Constant, Dims, Encoding
from posenc_jax.encodings.rotary import apply_rotary, cos_sin, head_frequencies
from posenc_jax.schema import Positive, Range

LARGEST = 80.0  # the logarithm of the largest scale; the largest float32 is e^88


class XPos(Encoding):
    r"""xPos: RoPE whose pairs decay with the distance, the fast ones first.

    .. math:: z_{ij} = \Big(\sum_m \zeta_m^{(i-j)/s}\, q_i^{(m)} \cdot \mathrm{rot}((j-i)\,\theta_m)\, k_j^{(m)}\Big)
        / \sqrt{d}, \quad \zeta_m = \frac{2m/d + \gamma}{1 + \gamma}, \quad \theta_m = base^{-2m/d}

    Queries are multiplied by zeta^((i-c)/s) and keys by zeta^((c-j)/s), where s is `scale_base` in tokens. c is the
    middle of the keys' positions, so that neither factor overflows. It cancels exactly while the keys span less than
    160 s / ln(1/zeta_0) tokens (65,000 by default). Beyond, logits stay finite, but the fastest pairs decay too little.
    A cache must hold the keys from before the rotation, as c moves. Nothing is learned.

    Source: Sun et al. 2022, and the released code, whose gamma and s are the defaults. Differs from that code: there c
    is half the number of positions, wherever they begin.
    """

    causal_only = True

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = 10000.0
        scale_base: Positive = 512.0  # s, tokens
        gamma: Positive = 0.4

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        zeta = (np.arange(0, dims.head_dim, 2) / dims.head_dim + config.gamma) / (1 + config.gamma)
        self.inverse_frequencies = Constant(jnp.asarray(theta, jnp.float32))  # [d/2] radians per token
        self.decay = Constant(jnp.asarray(np.log(zeta) / config.scale_base, jnp.float32))  # [d/2] log per token

    def rotate(self, q, k, q_pos, k_pos, ctx):
        centre = (k_pos.min(axis=-1, keepdims=True) + k_pos.max(axis=-1, keepdims=True)) / 2
        return self._rotate(q, q_pos, q_pos - centre), self._rotate(k, k_pos, centre - k_pos)

    def _rotate(
        self, x: Float[Array, "B T H d"], positions: Real[Array, "#B T"], exponents: Float[Array, "#B T"]
    ) -> Float[Array, "B T H d"]:
        cos, sin = cos_sin(positions, self.inverse_frequencies[...])
        scale = jnp.exp(jnp.clip(exponents[:, :, None, None] * self.decay[...], -LARGEST, LARGEST))
        return apply_rotary(x, cos * scale, sin * scale)
