"""RoPE, and the encodings that differ from it only in the rates at which pairs of channels are rotated."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Constant, Dims, Encoding
from posenc_jax.schema import ConfigError, Fraction, Range


class Rotary(Encoding):
    """The rotation of queries and keys that all encodings of this file share. Subclasses set inverse frequencies."""

    inverse_frequencies: Constant  # [r/2] radians per token
    pairing: str = "half"

    def cos_sin(self, positions: Real[Array, "#B T"]) -> tuple[Float[Array, "#B T 1 r"], Float[Array, "#B T 1 r"]]:
        """Cosines and sines of the angles at these positions."""
        return cos_sin(positions, self.inverse_frequencies[...])

    def rotate(self, q, k, q_pos, k_pos, ctx):
        return apply_rotary(q, *self.cos_sin(q_pos), self.pairing), apply_rotary(k, *self.cos_sin(k_pos), self.pairing)


def head_frequencies(dims: Dims, base: float) -> np.ndarray:
    """RoPE's inverse frequencies [d/2] (radians per token) for all channels of a head.

    Raises ConfigError if head_dim is odd, as one channel would be in no pair.
    """
    if dims.head_dim % 2:
        allowed = "must be even for this encoding, which rotates pairs of channels"
        raise ConfigError("config.model.head_dim", dims.head_dim, allowed)
    return frequencies.none(dims.head_dim, base, dims.max_length)[0]


class RoPE(Rotary):
    r"""Rotary position embedding: pairs of channels are rotated by the position, each pair at its own rate.

    .. math:: z_{ij} = (R_i q_i) \cdot (R_j k_j) / \sqrt{d} = q_i \cdot R_{j-i}\, k_j / \sqrt{d},
        \quad R_t = \mathrm{diag}_m\, \mathrm{rot}(t\,\theta_m), \quad \theta_m = base^{-2m/r}

    over the first r = fraction * d channels of each head; the others are not rotated. Angles (radians) are float32
    products of positions (tokens) and inverse frequencies, which are computed in float64. Nothing is learned.

    `pairing` says which channels form a pair: "half" (m and m + r/2: GPT-NeoX, Llama in Hugging Face) or "interleaved"
    (2m and 2m + 1: the paper, GPT-J, Meta's Llama). The two differ by a fixed permutation of channels, so the choice
    matters only when weights are loaded. `scaling` is a rule of `frequencies` that is applied from training on. Rules
    can also be applied to trained weights, at evaluation.

    Source: Su et al. 2021, §3.2-3.4; partial rotation: GPT-NeoX (Black et al. 2022).
    """

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = 10000.0
        fraction: Fraction = 1.0  # of the head's channels that are rotated
        pairing: Literal["half", "interleaved"] = "half"
        scaling: frequencies.Text = field(default="none", metadata={"alternative": "linear:factor=2"})

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        width = int(config.fraction * dims.head_dim)
        if width % 2 or width < 4:
            found = f"{width} of head_dim = {dims.head_dim}"
            allowed = f"must rotate an even number of channels, at least 4, not {found}"
            raise ConfigError("encoding.fraction", config.fraction, allowed)
        scaling = frequencies.parse(config.scaling, "encoding.scaling")
        scaling.check(width, config.base, dims.max_length, (), "encoding.scaling")
        theta, factor = scaling.frequencies(width, config.base, dims.max_length)
        self.pairing = config.pairing
        self.inverse_frequencies = Constant(jnp.asarray(theta, jnp.float32))  # [r/2] radians per token
        self.attention_factor = Constant(jnp.full((), factor, jnp.float32))

    def cos_sin(self, positions):
        cos, sin = super().cos_sin(positions)
        return cos * self.attention_factor[...], sin * self.attention_factor[...]


class PRoPE(Rotary):
    r"""p-RoPE: RoPE without the rotation of its slowest pairs, which then match content at any distance.

    .. math:: z_{ij} = q_i \cdot R_{j-i}\, k_j / \sqrt{d}, \quad R_t = \mathrm{diag}_m\, \mathrm{rot}(t\,\theta_m),
        \quad \theta_m = base^{-2m/d} \text{ for } m < \lfloor p\,d/2 \rfloor, \text{ else } 0

    p is `fraction`: 1 is RoPE, 0 is no encoding. RoPE's own `fraction` is different: it spreads the whole range of
    rates over fewer pairs, while here the remaining rates are RoPE's. `reversed` rotates the slowest pairs instead,
    which is an ablation of the paper. Rates in radians per token. Nothing is learned. Source: Barbero et al. 2024; the
    number of pairs as in Hugging Face's "proportional" rule (Gemma).
    """

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = 10000.0
        fraction: Fraction = 0.75  # p, of the pairs that are rotated
        reversed: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        turning = np.arange(len(theta)) < int(config.fraction * dims.head_dim / 2)
        if config.reversed:
            turning = turning[::-1]
        self.inverse_frequencies = Constant(jnp.asarray(np.where(turning, theta, 0), jnp.float32))


class HoPE(Rotary):
    r"""High-frequency RoPE: pairs that would not turn once within the training length are not rotated.

    .. math:: z_{ij} = q_i \cdot R_{j-i}\, k_j / \sqrt{d}, \quad R_t = \mathrm{diag}_m\, \mathrm{rot}(t\,\theta_m),
        \quad \theta_m = base^{-2m/d} \text{ where that is at least } 2\pi/L, \text{ else } 0

    In training every rotated pair then goes through all of its angles, so that none is new past the training length L
    (tokens). The other pairs carry only content. Rates in radians per token. Nothing is learned. Source: Chen et al.
    2024 ("HoPE: ... without long-term decay"). It is neither the hyperbolic HoPE (2025) nor that of video models
    (2025).
    """

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = field(default=10000.0, metadata={"alternative": 100.0})

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        whole_turn = theta >= 2 * math.pi / dims.max_length
        self.inverse_frequencies = Constant(jnp.asarray(np.where(whole_turn, theta, 0), jnp.float32))


class LearnedRoPE(Rotary):
    r"""RoPE with learned rates ("LeRoPE"). The logarithm of each pair's rate starts from RoPE's.

    .. math:: z_{ij} = q_i \cdot R_{j-i}\, k_j / \sqrt{d}, \quad R_t = \mathrm{diag}_m\, \mathrm{rot}(t\,\theta_m),
        \quad \theta_m = base^{-2m/d}\, e^{\delta_m}

    Rates in radians per token. Learned: delta [d/2], initially 0, one set for all heads and layers. Its gradient grows
    with the distances of the batch, as that of an angle does. Source: LeRoPE (2026), which we know only from notes, not
    from its text or code. Differs from it: the gradient of delta is clipped with all others, not separately.
    """

    @dataclass(frozen=True)
    class Config:
        base: Annotated[float, Range(above=1)] = 10000.0

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        self.inverse_frequencies = Constant(jnp.asarray(theta, jnp.float32))
        self.offsets = nnx.Param(jnp.zeros(len(theta), jnp.float32))

    def cos_sin(self, positions):
        return cos_sin(positions, self.inverse_frequencies[...] * jnp.exp(self.offsets[...]))


def cos_sin(
    positions: Real[Array, "#B T"], inverse_frequencies: Float[Array, "r"] | Float[Array, "#H r"]
) -> tuple[Float[Array, "#B T #H r"], Float[Array, "#B T #H r"]]:
    """Cosines and sines of the angles position * inverse frequency, in float32, for all heads together or for each."""
    angles = positions[:, :, None, None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "B T H d"], cos: Float[Array, "#B T #H r"], sin: Float[Array, "#B T #H r"], pairing: str = "half"
) -> Float[Array, "B T H d"]:
    """Rotate the first r pairs of channels of each head: (a, b) becomes (a cos - b sin, b cos + a sin)."""
    width = 2 * cos.shape[-1]
    own = x[..., :width].astype(jnp.float32)
    # Rolling the channels brings the other one of each pair. On CPU that is far faster than splitting the pairs.
    if pairing == "half":
        other = jnp.roll(own, width // 2, axis=-1)
        cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    else:
        first = jnp.arange(width) % 2 == 0
        other = jnp.where(first, jnp.roll(own, -1, axis=-1), jnp.roll(own, 1, axis=-1))
        cos, sin = jnp.repeat(cos, 2, axis=-1), jnp.where(first, -1, 1) * jnp.repeat(sin, 2, axis=-1)
    result = (own * cos + other * sin).astype(x.dtype)
    return result if width == x.shape[-1] else jnp.concatenate([result, x[..., width:]], axis=-1)
