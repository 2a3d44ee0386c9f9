"""Encodings that rotate queries and keys by their positions."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Constant, Dims, Encoding
from posenc_jax.schema import ConfigError, Fraction, Range


class RoPE(Encoding):
    r"""Rotary position embedding: pairs of channels turn with the position, each pair at its own rate.

    .. math:: z_{ij} = (R_i q_i) \cdot (R_j k_j) / \sqrt{d} = q_i \cdot R_{j-i}\, k_j / \sqrt{d},
        \quad R_t = \mathrm{diag}_m\, \mathrm{rot}(t\,\theta_m), \quad \theta_m = base^{-2m/r}

    over the first r = fraction * d channels of each head; the others are not rotated. Angles (radians) are float32
    products of positions (tokens) and of inverse frequencies computed in float64. Nothing is learned.

    `pairing` says which channels form a pair: "half" (m and m + r/2: GPT-NeoX, Llama in Hugging Face) or "interleaved"
    (2m and 2m + 1: the paper, GPT-J, Meta's Llama). The two are one function up to a fixed permutation of channels, so
    the choice matters for loading weights only. `scaling` is a rule of `frequencies`, applied from training on; rules
    can also be applied to trained weights, at evaluation.

    Source: Su et al. 2021, §3.2-3.4; partial rotation: GPT-NeoX (Black et al. 2022, §2.1).
    """

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = 10000.0
        fraction: Fraction = 1.0  # of the head's channels that are rotated
        pairing: Literal["half", "interleaved"] = "half"
        scaling: str = field(default="none", metadata={"alternative": "linear:factor=2"})

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        width = int(config.fraction * dims.head_dim)
        if width % 2 or width < 4:
            allowed = (
                f"must rotate an even number of channels, at least 4; of head_dim = {dims.head_dim} that is {width}"
            )
            raise ConfigError("encoding.fraction", config.fraction, allowed)
        scaling = frequencies.parse(config.scaling, "encoding.scaling")
        theta, factor = scaling.frequencies(width, config.base, dims.max_length)
        self.pairing = config.pairing
        self.inverse_frequencies = Constant(jnp.asarray(theta, jnp.float32))  # [r/2] radians per token
        self.attention_factor = Constant(jnp.full((), factor, jnp.float32))

    def rotate(self, q, k, q_pos, k_pos, ctx):
        return self._rotate(q, q_pos), self._rotate(k, k_pos)

    def _rotate(self, x: Float[Array, "B T H d"], positions: Real[Array, "#B T"]) -> Float[Array, "B T H d"]:
        angles = positions[..., None].astype(jnp.float32) * self.inverse_frequencies[...]  # [B, T, r/2]
        cos, sin = jnp.cos(angles) * self.attention_factor[...], jnp.sin(angles) * self.attention_factor[...]
        # A pair (a, b) becomes (a cos - b sin, b cos + a sin): the pair by cos, plus the pair swapped by (-sin, sin).
        axis = -2 if self.pairing == "half" else -1
        cos, sin = jnp.expand_dims(cos, axis), jnp.stack([-sin, sin], axis)
        width = 2 * angles.shape[-1]
        pairs = x[..., :width].astype(jnp.float32).reshape(*x.shape[:-1], *sin.shape[2:])
        rotated = (pairs * cos[:, :, None] + jnp.flip(pairs, axis) * sin[:, :, None]).reshape(*x.shape[:-1], width)
        return jnp.concatenate([rotated.astype(x.dtype), x[..., width:]], axis=-1)
