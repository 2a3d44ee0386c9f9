"""RoPE, and the other encodings that rotate pairs of channels of queries and keys."""

import math
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Base, Constant, Dims, Encoding, constant
from posenc_jax.schema import ConfigError, Fraction, NonNegative, Positive


class Rotary(Encoding):
    """The rotation of queries and keys that most encodings of this file share. Subclasses set inverse frequencies."""

    rotates_keys_once = True
    inverse_frequencies: Constant  # radians per token
    pairing: str = "half"

    def cos_sin(self, positions: Real[Array, "#B T"]) -> tuple[Float[Array, "#B T 1 r"], Float[Array, "#B T 1 r"]]:
        """Cosines and sines of the angles at these positions."""
        return cos_sin(positions, self.inverse_frequencies[...])

    def rotate(self, q, k, q_pos, k_pos, ctx):
        return self.rotated(q, q_pos), self.rotated(k, k_pos)

    def rotated(self, x: Float[Array, "B T H d"], positions: Real[Array, "#B T"]) -> Float[Array, "B T H d"]:
        """Queries or keys, rotated by their positions."""
        return apply_rotary(x, *self.cos_sin(positions), self.pairing)


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
    can also be applied to trained weights, at evaluation. `window_base` is the base in layers whose attention has a
    window, which rules never scale (Gemma 3); 0 stands for `base`.

    Source: Su et al. 2021, §3.2-3.4; partial rotation: GPT-NeoX (Black et al. 2022).
    """

    @dataclass(frozen=True)
    class Config:
        base: Base = 10000.0
        fraction: Fraction = 1.0  # of the head's channels that are rotated
        pairing: Literal["half", "interleaved"] = "half"
        scaling: frequencies.Text = field(default="none", metadata={"alternative": "linear:factor=2"})
        window_base: NonNegative = field(default=0.0, metadata={"alternative": 50.0})  # 0, or above 1

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        width = int(config.fraction * dims.head_dim)
        if width % 2 or width < 4:
            found = f"{width} of head_dim = {dims.head_dim}"
            allowed = f"must rotate an even number of channels, at least 4, not {found}"
            raise ConfigError("encoding.fraction", config.fraction, allowed)
        if 0 < config.window_base <= 1:
            raise ConfigError("encoding.window_base", config.window_base, "must be above 1, or 0 for encoding.base")
        scaling = frequencies.parse(config.scaling, "encoding.scaling")
        scaling.check(width, config.base, dims.max_length, (), "encoding.scaling")
        theta, factor = scaling.frequencies(width, config.base, dims.max_length)
        self.pairing = config.pairing
        self.inverse_frequencies = constant(theta)  # [r/2] radians per token
        self.attention_factor = constant(factor)

    def cos_sin(self, positions):
        cos, sin = super().cos_sin(positions)
        return cos * self.attention_factor[...], sin * self.attention_factor[...]


class PRoPE(Rotary):
    r"""p-RoPE: RoPE without the rotation of its slowest pairs, which then match content at any distance.

    .. math:: z_{ij} = q_i \cdot R_{j-i}\, k_j / \sqrt{d}, \quad R_t = \mathrm{diag}_m\, \mathrm{rot}(t\,\theta_m),
        \quad \theta_m = base^{-2m/d} \text{ for } m < \lfloor p\,d/2 \rfloor, \text{ else } 0

    p is `fraction`: 1 is RoPE, 0 is no encoding. RoPE's own `fraction` is different: it spreads the whole range of
    rates over fewer pairs, while here the remaining rates are RoPE's. `reversed` rotates the slowest pairs instead,
    which is an ablation of the paper. With `key_offset`, the channels of a key that are not rotated are those of the
    token before it (of the first token, its own). A single layer can then find the token that followed an earlier copy
    of the query's token (partial key offset: modded-nanogpt, pull request 169). Rates in radians per token. Nothing is
    learned. Source: Barbero et al. 2024; the number of pairs as in Hugging Face's "proportional" rule (Gemma).
    """

    @dataclass(frozen=True)
    class Config:
        base: Base = 10000.0
        fraction: Fraction = 0.75  # p, of the pairs that are rotated
        reversed: bool = False
        key_offset: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        turning = np.arange(len(theta)) < int(config.fraction * dims.head_dim / 2)
        if config.reversed:
            turning = turning[::-1]
        self.inverse_frequencies = constant(np.where(turning, theta, 0))
        self.key_offset = config.key_offset
        self.rotates_keys_once = not config.key_offset

    @property
    def packable(self):
        return not self.key_offset  # `rotate` does not know which document the token before it belongs to

    def rotate(self, q, k, q_pos, k_pos, ctx):
        q, k = super().rotate(q, k, q_pos, k_pos, ctx)
        if self.key_offset:
            earlier = jnp.concatenate([k[:, :1], k[:, :-1]], axis=1)
            k = jnp.where(jnp.tile(self.inverse_frequencies[...] == 0, 2), earlier, k)
        return q, k


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
        base: Base = field(default=10000.0, metadata={"alternative": 100.0})

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = head_frequencies(dims, config.base)
        self.inverse_frequencies = constant(np.where(theta >= 2 * math.pi / dims.max_length, theta, 0))


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
        base: Base = 10000.0

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.inverse_frequencies = constant(head_frequencies(dims, config.base))
        self.offsets = nnx.Param(jnp.zeros(dims.head_dim // 2, jnp.float32))

    def cos_sin(self, positions):
        return cos_sin(positions, self.inverse_frequencies[...] * jnp.exp(self.offsets[...]))


class XPos(Rotary):
    r"""xPos: RoPE whose pairs decay with the distance, the fast ones first.

    .. math:: z_{ij} = \Big(\sum_m \zeta_m^{(i-j)/s}\, q_i^{(m)} \cdot \mathrm{rot}((j-i)\,\theta_m)\, k_j^{(m)}\Big)
        / \sqrt{d}, \quad \zeta_m = \frac{2m/d + \gamma}{1 + \gamma}, \quad \theta_m = base^{-2m/d}

    Queries are multiplied by zeta^((i-c)/s) and keys by zeta^((c-j)/s), where s is `scale_base` in tokens. c is the
    middle of the keys' positions, so that neither factor overflows. It cancels exactly while the keys span less than
    160 s / ln(1/zeta_0) tokens (65,000 by default). Beyond, logits stay finite, but the fastest pairs decay too little.
    A cache holds the keys from before the rotation, as c moves. Nothing is learned.

    Source: Sun et al. 2022, and the released code, whose gamma and s are the defaults. Differs from that code: there c
    is half the number of positions, wherever they begin.
    """

    rotates_keys_once = False
    causal_only = True

    @dataclass(frozen=True)
    class Config:
        base: Base = 10000.0
        scale_base: Positive = 512.0  # s, tokens
        gamma: Positive = 0.4

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.inverse_frequencies = constant(head_frequencies(dims, config.base))
        zeta = (np.arange(0, dims.head_dim, 2) / dims.head_dim + config.gamma) / (1 + config.gamma)
        self.decay = constant(np.log(zeta) / config.scale_base)  # [d/2] log per token

    def rotate(self, q, k, q_pos, k_pos, ctx):
        centre = (k_pos.min(axis=-1, keepdims=True) + k_pos.max(axis=-1, keepdims=True)) / 2
        return self._scaled(q, q_pos, q_pos - centre), self._scaled(k, k_pos, centre - k_pos)

    def _scaled(self, x: Array, positions: Array, exponents: Float[Array, "#B T"]) -> Float[Array, "B T H d"]:
        cos, sin = self.cos_sin(positions)
        log_scale = exponents[:, :, None, None] * self.decay[...]
        scale = jnp.exp(jnp.clip(log_scale, -80.0, 80.0))  # the largest float32 is e^88
        return apply_rotary(x, cos * scale, sin * scale)


class FoPE(Rotary):
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
        base: Base = field(default=10000.0, metadata={"alternative": 100.0})
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
        self.inverse_frequencies = constant(theta)  # [n] radians per token
        shape, kind = (heads, rates, series), nnx.Param if config.learned else Constant
        noise = (stddev * jax.random.normal(rngs.params(), shape, jnp.float32) for _ in range(2))
        self.cos_coefficients, self.sin_coefficients = (kind(main_rates(rates, series) + x) for x in noise)
        self.still_sin = constant(float(config.faithful))

    def rotated(self, x, positions):
        cos, sin = (wave[:, :, 0] for wave in self.cos_sin(positions))
        cos = jnp.einsum("btn,knm->btkm", cos, self.cos_coefficients[...])
        sin = jnp.einsum("btn,knm->btkm", sin, self.sin_coefficients[...])
        still = [(0, 0)] * 3 + [(0, x.shape[-1] // 2 - cos.shape[-1])]
        cos, sin = jnp.pad(cos, still, constant_values=1), jnp.pad(sin, still, constant_values=self.still_sin[...])
        groups = x.shape[2] // cos.shape[2]
        return apply_rotary(x, jnp.repeat(cos, groups, axis=2), jnp.repeat(sin, groups, axis=2))


class PoPE(Rotary):
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
        base: Base = 10000.0
        initial: Literal["zero", "uniform"] = "zero"  # delta

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = config.base ** (-np.arange(dims.head_dim, dtype=np.float64) / dims.head_dim)
        self.inverse_frequencies = constant(theta)  # [d] radians per token
        shape = dims.num_heads, dims.head_dim
        uniform = jax.random.uniform(rngs.params(), shape, jnp.float32, -2 * math.pi, 0)
        self.delta = nnx.Param(uniform if config.initial == "uniform" else jnp.zeros(shape, jnp.float32))

    def rotate(self, q, k, q_pos, k_pos, ctx):
        # Logits are divided by the square root of the width, which is 2d.
        q_magnitude = math.sqrt(2) * jax.nn.softplus(q.astype(jnp.float32))
        k_magnitude = jax.nn.softplus(k.astype(jnp.float32))
        q_cos, q_sin = self.cos_sin(q_pos)
        # The gradient of delta is 1 on its bounds, where that of jnp.clip is 1/2, and 0 beyond them.
        inside = (self.delta[...] >= -2 * math.pi) & (self.delta[...] <= 0)
        bounded = jnp.clip(jax.lax.stop_gradient(self.delta[...]), -2 * math.pi, 0)
        delta = jnp.where(inside, self.delta[...], bounded)
        cos, sin = jnp.cos(delta), jnp.sin(delta)
        q_cos, q_sin = q_cos * cos + q_sin * sin, q_sin * cos - q_cos * sin  # of the angle minus delta
        wide_q = jnp.concatenate([q_magnitude * q_cos, q_magnitude * q_sin], axis=-1)
        k_cos, k_sin = self.cos_sin(k_pos)
        wide_k = jnp.concatenate([k_magnitude * k_cos, k_magnitude * k_sin], axis=-1)
        return wide_q.astype(q.dtype), wide_k.astype(k.dtype)


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


def main_rates(rates: int, series: int) -> Float[np.ndarray, "n m"]:
    """1 where a series has its main rate: the identity, or evenly spaced rows of it for fewer series than rates."""
    step = math.ceil(rates / max(series, 1))
    return (np.arange(rates)[:, None] == step * np.arange(series)).astype(np.float32)
