"""Encodings that add a function of the two positions to the attention logits."""

import math
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.encodings.base import Constant, Dims, Encoding, distances
from posenc_jax.schema import ConfigError, Count, Positive, Range


class ALiBi(Encoding):
    r"""Attention with Linear Biases: each head prefers recent tokens, at its own rate.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} - m_h\,(i - j)

    Slopes m_h (logits per token) are the geometric sequence of `alibi_slopes`. Nothing is learned. Source: Press et al.
    2022, §3. The bias is not multiplied by 1/sqrt(d), as in the authors' code.
    """

    @dataclass(frozen=True)
    class Config:
        max_exponent: Positive = 8.0  # slopes run from 2^(-max_exponent/H) to 2^-max_exponent

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.slopes = Constant(jnp.asarray(alibi_slopes(dims.num_heads, config.max_exponent), jnp.float32))  # [H]

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return -self.slopes[:, None, None] * distances(q_pos, k_pos)[:, None].astype(jnp.float32)


class T5(Encoding):
    r"""T5's relative bias: one learned scalar per head for each bucket of distances, shared by all layers.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + b_{h,\,\mathrm{bucket}(i - j)}

    Half of the buckets hold one distance (tokens) each, the others grow logarithmically up to `max_distance`, and the
    last holds all beyond. Learned: b [buckets, H], initially normal with standard deviation `stddev`. Source: Raffel et
    al. 2020, §2.1, causal form. Differs from the reference: T5 does not divide its logits by sqrt(d).
    """

    @dataclass(frozen=True)
    class Config:
        buckets: Annotated[int, Range(at_least=4)] = 32
        max_distance: Count = 128
        stddev: Positive = 0.02

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        if config.buckets % 2 or config.max_distance <= config.buckets // 2:
            allowed = f"must be even, and half of it below max_distance = {config.max_distance}"
            raise ConfigError("encoding.buckets", config.buckets, allowed)
        shape = (config.buckets, dims.num_heads)
        self.max_distance = config.max_distance
        self.table = nnx.Param(config.stddev * jax.random.normal(rngs.params(), shape, jnp.float32))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        buckets = t5_bucket(distances(q_pos, k_pos), self.table.shape[0], self.max_distance)
        return jnp.moveaxis(self.table[...][buckets], -1, 1)


class FIRE(Encoding):
    r"""Functional interpolation: a learned function of the distance as a share of the positions so far.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + f_\theta\!\left(\frac{\psi(i - j)}{\psi(\max(i, L))}\right)_h,
        \quad \psi(n) = \ln(|c\,n| + 1)

    The argument lies in [0, 1] at any length (distances and L in tokens). Learned, one set per layer: the two-layer
    ReLU network f (1 - width - H), c (initially `c`), and L as a multiple of `threshold` (initially 1). Source: Li et
    al. 2024, §3.2, with the initial values of its published re-implementation in DAPE. Differs from the reference: no
    constant is added after the network's second layer, as softmax ignores it.
    """

    shared = False
    relative = False

    @dataclass(frozen=True)
    class Config:
        width: Count = 32
        c: Positive = 0.1
        threshold: Positive = 512.0  # tokens

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(1, config.width, rngs=rngs)
        self.out = nnx.Linear(config.width, dims.num_heads, use_bias=False, rngs=rngs)
        self.c = nnx.Param(jnp.full((), config.c, jnp.float32))
        self.multiplier = nnx.Param(jnp.ones((), jnp.float32))
        self.threshold = Constant(jnp.full((), config.threshold, jnp.float32))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        share = self.normalized_distance(q_pos, k_pos)
        hidden = jax.nn.relu(self.hidden(share[..., None]))
        return jnp.moveaxis(self.out(hidden), -1, 1)

    def normalized_distance(self, q_pos: Real[Array, "#B T"], k_pos: Real[Array, "#B S"]) -> Float[Array, "#B T S"]:
        """The argument of f: 0 for a token itself, 1 for the first one seen from L or further; 0 for keys ahead."""
        distance = jnp.maximum(distances(q_pos, k_pos), 0).astype(jnp.float32)
        threshold = jnp.abs(self.multiplier[...] * self.threshold[...])
        largest = jnp.maximum(q_pos.astype(jnp.float32), threshold)
        return self._psi(distance) / self._psi(largest)[:, :, None]

    def _psi(self, n):
        return jnp.log(jnp.abs(self.c[...] * n) + 1)


def alibi_slopes(num_heads: int, max_exponent: float = 8.0) -> np.ndarray:
    """ALiBi's slopes [H]: 2^(-max_exponent h/H), h = 1 .. H, where H is a power of two.

    Otherwise those of the power of two P below, then every other one of 2P, from the first: Press et al.'s code.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = 2.0 ** (-max_exponent * np.arange(1, power + 1) / power)
    if power < num_heads:
        slopes = np.concatenate([slopes, alibi_slopes(2 * power, max_exponent)[0::2][: num_heads - power]])
    return slopes


def t5_bucket(distance: Real[Array, "..."], buckets: int = 32, max_distance: int = 128) -> Int[Array, "..."]:
    """The bucket of each distance (tokens), causal: keys ahead of the query fall into bucket 0."""
    exact = buckets // 2
    distance = jnp.maximum(distance, 0).astype(jnp.int32)
    ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(max_distance / exact)
    growing = exact + (ratio * (buckets - exact)).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(growing, buckets - 1))
