"""Encodings that add a function of the two positions to the attention logits."""

import functools
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.encodings.base import Base, Dims, DistanceBias, Encoding, Pairwise, constant, distances, full_float32
from posenc_jax.schema import ConfigError, Count, Positive, Range


class ALiBi(DistanceBias):
    r"""Attention with Linear Biases: each head prefers recent tokens, with its own slope.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} - m_h\,|i - j|

    Slopes m_h (logits per token) are the geometric sequence of `alibi_slopes`. By default nothing is learned. If
    `learned`, each slope is multiplied by a factor, one per head shared by all layers. The logarithm of the factor is
    learned (initially 0), so that slopes stay positive. Source: Press et al. 2022, §3. As in the authors' code, the
    bias is not multiplied by 1/sqrt(d). In an encoder it is the same on both sides, as in x-transformers.
    """

    both_ways = True

    @dataclass(frozen=True)
    class Config:
        max_exponent: Positive = 8.0  # slopes run from 2^(-max_exponent/H) to 2^-max_exponent
        learned: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.slopes = constant(alibi_slopes(dims.num_heads, config.max_exponent))  # [H]
        self.log_factors = nnx.Param(jnp.zeros(dims.num_heads, jnp.float32)) if config.learned else None

    def distance_bias(self, distance):
        slopes = self.slopes[...]
        if self.log_factors is not None:
            slopes = slopes * jnp.exp(self.log_factors[...])
        return -jnp.multiply.outer(slopes, jnp.abs(distance).astype(jnp.float32))


class KERPLE(DistanceBias):
    r"""Kernelized relative bias: minus a logarithm, or a power, of the distance, at rates learned by each head.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} - p_h \ln(1 + a_h n) \quad\text{("log") or}\quad
        z_{ij} = q_i \cdot k_j / \sqrt{d} - a_h n^{p_h} \quad\text{("power")}, \quad n = |i - j|

    "log" multiplies attention by the power law (1 + a n)^-p. "power" with p = 1 is ALiBi. Learned: a > 0 and p > 0, one
    of each per head, shared by all layers; for "power" also p < 2. Both are the softplus of a trained number, and p of
    "power" is twice its sigmoid, so that no update can leave the range. Initially a = 1/2 and p = 1/H, 3/H .. 2 - 1/H
    for "log"; a is ALiBi's slope and p = 1 for "power". Source: Chi et al. 2022, §4. Differs from the reference: there
    a and p start from random numbers in [0, 1] and [0, 2], and are clipped to at least 0.01 whenever they are used.
    """

    both_ways = True

    @dataclass(frozen=True)
    class Config:
        form: Literal["log", "power"] = "log"

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        heads = dims.num_heads
        self.form = config.form
        if self.form == "log":
            a, raw_p = np.full(heads, 0.5), inverse_softplus(np.arange(1, 2 * heads, 2) / heads)
        else:
            a, raw_p = alibi_slopes(heads), np.zeros(heads)
        self.raw_a = nnx.Param(jnp.asarray(inverse_softplus(a), jnp.float32))
        self.raw_p = nnx.Param(jnp.asarray(raw_p, jnp.float32))

    def distance_bias(self, distance):
        distance = jnp.abs(distance.astype(jnp.float32))

        def of_head(a, p):
            if self.form == "log":
                return -p * jnp.log1p(a * distance)
            return -a * distance**p  # JAX has the gradient of 0^p with respect to p as 0

        return jax.vmap(of_head)(*self.a_and_p())

    def a_and_p(self) -> tuple[Float[Array, "H"], Float[Array, "H"]]:
        """The two rates of each head."""
        raw_p = self.raw_p[...]
        p = jax.nn.softplus(raw_p) if self.form == "log" else 2 * jax.nn.sigmoid(raw_p)
        return jax.nn.softplus(self.raw_a[...]), p


class Sandwich(DistanceBias):
    r"""Sandwich: the product of two sinusoidal embeddings, which falls and oscillates with the distance.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + \frac{H}{r\,h} \Big(\sum_{m=1}^{c/2}
        \cos\big((i - j)\, base^{-2m/c}\big) - \frac{c}{2}\Big), \quad h = 1 .. H

    with c = `dimension`, which does not depend on the model's width, and r = `ratio`. Nothing is learned. Source: Chi
    et al. 2023 ("Dissecting Transformer Length Extrapolation"). As in NeMo's code, frequencies begin at m = 1 and the
    bias is 0 at distance 0. For given positions the sum is a float32 product of the two embeddings, so that no array is
    larger than the bias.
    """

    @dataclass(frozen=True)
    class Config:
        dimension: Annotated[int, Range(at_least=2, at_most=2**16)] = 128
        base: Base = 10000.0
        ratio: Positive = 8.0

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        if config.dimension % 2:
            raise ConfigError("encoding.dimension", config.dimension, "must be even")
        theta = config.base ** (-np.arange(2, config.dimension + 1, 2, dtype=np.float64) / config.dimension)
        self.inverse_frequencies = constant(theta)  # [c/2] radians per token
        self.ratios = constant(config.ratio * np.arange(1, dims.num_heads + 1) / dims.num_heads)  # [H]

    def distance_bias(self, distance):
        angles = distance[..., None].astype(jnp.float32) * self.inverse_frequencies[...]
        return self._of_similarity(jnp.cos(angles).sum(axis=-1))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        queries, keys = self._waves(q_pos), self._waves(k_pos)
        similarity = jnp.einsum("btc,bsc->bts", queries, keys, precision=jax.lax.Precision.HIGHEST)
        return jnp.moveaxis(self._of_similarity(similarity), 0, 1)

    def _waves(self, positions):
        angles = positions[..., None].astype(jnp.float32) * self.inverse_frequencies[...]
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

    def _of_similarity(self, similarity):
        return jnp.multiply.outer(1 / self.ratios[...], similarity - len(self.inverse_frequencies[...]))


class T5(DistanceBias):
    r"""T5's relative bias: one learned scalar per head for each bucket of distances, shared by all layers.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + \sqrt{d}\, b_{h,\,\mathrm{bucket}(i - j)}

    Half of the buckets hold one distance (tokens) each. The others grow logarithmically up to `max_distance`, and the
    last one also holds all larger distances. If `bidirectional`, for encoders, half of all buckets are for keys behind
    the query, and the others for keys ahead of it. Learned: b [buckets, H], initially normal with standard deviation
    `stddev`. Source: Raffel et al. 2020, §2.1. The factor sqrt(d) is that of GPT-NeoX and x-transformers.
    Differs from the reference: T5 adds b without the factor, to logits that it does not divide by sqrt(d). It trains
    with Adafactor, whose steps grow with the parameters. Adam's steps do not, and the factor lets it move a bias by
    more than the learning rate in one step.
    """

    @dataclass(frozen=True)
    class Config:
        buckets: Annotated[int, Range(at_least=4)] = 32
        max_distance: Count = 128
        stddev: Positive = 0.02
        bidirectional: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        sides = 2 if config.bidirectional else 1
        if config.buckets % (2 * sides) or config.max_distance <= config.buckets // (2 * sides):
            part = "a quarter" if config.bidirectional else "half"
            allowed = f"must be a multiple of {2 * sides}, and {part} of it below max_distance = {config.max_distance}"
            raise ConfigError("encoding.buckets", config.buckets, allowed)
        self.both_ways = config.bidirectional
        shape = (config.buckets, dims.num_heads)
        self.max_distance, self.scale = config.max_distance, math.sqrt(dims.head_dim)
        self.table = nnx.Param(config.stddev * jax.random.normal(rngs.params(), shape, jnp.float32))

    def distance_bias(self, distance):
        buckets = self.table.shape[0]
        if self.both_ways:
            behind = t5_bucket(jnp.abs(distance), buckets // 2, self.max_distance)
            buckets = jnp.where(distance < 0, behind + buckets // 2, behind)
        else:
            buckets = t5_bucket(distance, buckets, self.max_distance)
        return jnp.moveaxis(self.scale * self.table[...][buckets], -1, 0)


class FIRE(Encoding):
    r"""Functional interpolation: a learned function of the distance divided by the query's position.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + f_\theta\!\left(\frac{\psi(i - j)}{\psi(\max(i, L))}\right)_h,
        \quad \psi(n) = \ln(|c\,n| + 1)

    The argument of f lies in [0, 1] at any length (distances and L in tokens). Learned, one set per layer: the
    two-layer ReLU network f (1 - width - H), initially as PyTorch's layers; c (initially `c`); and L, initially
    `threshold` times the training length and learned as a multiple of that. Source: Li et al. 2024, with the initial
    values of its published re-implementation in DAPE. Differs from that code: there L is 512 tokens at any training
    length, a quarter of the paper's 2048. (If L exceeds the training length, the normalizer is constant in training.)
    Here the network's second layer has no constant, as softmax ignores it.
    """

    shared = False
    relative = False

    @dataclass(frozen=True)
    class Config:
        width: Count = 32
        c: Positive = 0.1
        threshold: Positive = field(default=0.25, metadata={"alternative": 4.0})  # of the training length

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.hidden = nnx.Linear(1, config.width, kernel_init=uniform, bias_init=_uniform_within_one, rngs=rngs)
        self.out = nnx.Linear(config.width, dims.num_heads, use_bias=False, kernel_init=uniform, rngs=rngs)
        self.c = nnx.Param(jnp.full((), config.c, jnp.float32))
        self.multiplier = nnx.Param(jnp.ones((), jnp.float32))
        self.threshold = constant(config.threshold * dims.max_length)  # tokens

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        share = self.normalized_distance(q_pos, k_pos)
        return jnp.moveaxis(relu_network(share, *self._layers()), 0, 1)

    def pairwise(self, q, k, q_pos, k_pos, ctx):
        def share(query, key, i, j):
            largest, c = query
            return jnp.log(jnp.abs(c * jnp.maximum(i - j, 0)) + 1) / largest

        def unit(share, slope, constant, weight):
            return weight * jax.nn.relu(slope * share + constant)

        largest = self._psi(self._largest(q_pos))[..., None]
        slopes, constants, weights = self._layers()
        numbers = slopes[None], constants[None], weights.T
        return Pairwise(share, (largest, jnp.broadcast_to(self.c[...], largest.shape)), (), unit, numbers)

    def _layers(self):
        assert self.hidden.bias is not None  # as it was made
        return self.hidden.kernel[0], self.hidden.bias[...], self.out.kernel[...]

    def normalized_distance(self, q_pos: Real[Array, "#B T"], k_pos: Real[Array, "#B S"]) -> Float[Array, "#B T S"]:
        """The argument of f: 0 for the query itself and keys ahead of it, 1 for token 0 seen from L or further."""
        distance = jnp.maximum(distances(q_pos, k_pos), 0).astype(jnp.float32)
        return self._psi(distance) / self._psi(self._largest(q_pos))[:, :, None]

    def _largest(self, q_pos):
        return jnp.maximum(q_pos.astype(jnp.float32), jnp.abs(self.multiplier[...] * self.threshold[...]))

    def _psi(self, n):
        return jnp.log(jnp.abs(self.c[...] * n) + 1)


class DynamicBias(DistanceBias):
    r"""Dynamic position bias: a small network maps each distance to one bias per head.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + f_\theta\big(\mathrm{sign}(n) \ln(1 + |n|)\big)_h, \quad n = i - j

    or f(n) without `log_distance`; distances in tokens. Learned, one network shared by all layers: f (1 - width - .. -
    H) with `depth` hidden SiLU layers. Kernels are initially LeCun normal and constants 0. Source: Wang et al. 2022
    (CrossFormer); the logarithm: Liu et al. 2022 (Swin Transformer V2), §3.3; the network: x-transformers, whose width
    is D/4 and which does not take the logarithm by default. Differs from the papers: they have one network per layer,
    with ReLU, and CrossFormer's has layer norms. As in `FIRE`, the last layer has no constant.
    """

    @dataclass(frozen=True)
    class Config:
        width: Count = 32
        depth: Annotated[int, Range(at_least=1, at_most=100)] = 2
        log_distance: bool = True

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.depth, self.log_distance = config.depth, config.log_distance
        widths = [1] + [config.width] * config.depth
        for i in range(config.depth):
            setattr(self, f"hidden_{i}", nnx.Linear(widths[i], widths[i + 1], rngs=rngs))
        self.out = nnx.Linear(config.width, dims.num_heads, use_bias=False, rngs=rngs)

    @full_float32
    def distance_bias(self, distance):
        distance = distance.astype(jnp.float32)
        if self.log_distance:
            distance = jnp.sign(distance) * jnp.log1p(jnp.abs(distance))
        hidden = distance.reshape(-1, 1)
        for i in range(self.depth):
            hidden = jax.nn.silu(getattr(self, f"hidden_{i}")(hidden))
        return jnp.moveaxis(self.out(hidden).reshape(*distance.shape, -1), -1, 0)


def alibi_slopes(num_heads: int, max_exponent: float = 8.0) -> np.ndarray:
    """ALiBi's slopes [H]: 2^(-max_exponent h/H), h = 1 .. H, if H is a power of two.

    Otherwise, as in Press et al.'s code: the slopes for P heads, the largest power of two below H, and then every other
    slope for 2P heads, from the first.
    """
    power = 1 << num_heads.bit_length() - 1
    slopes = 2.0 ** (-max_exponent * np.arange(1, power + 1) / power)
    if power < num_heads:
        slopes = np.concatenate([slopes, alibi_slopes(2 * power, max_exponent)[0::2][: num_heads - power]])
    return slopes


def t5_bucket(distance: Real[Array, "..."], buckets: int = 32, max_distance: int = 128) -> Int[Array, "..."]:
    """The bucket of each distance (tokens). Keys ahead of the query are in bucket 0."""
    starts = jnp.asarray(t5_bucket_starts(buckets, max_distance))
    return jnp.searchsorted(starts, distance.astype(jnp.int32), side="right", method="scan_unrolled")


@functools.cache
def t5_bucket_starts(buckets: int, max_distance: int) -> Int[np.ndarray, "n"]:
    """The smallest distance (tokens) of each bucket but the first.

    With e = buckets / 2 and M = max_distance, bucket e + k begins at the smallest n for which e ln(n/e) / ln(M/e) >= k:
    at e (M/e)^(k/e), rounded up. If float64 cannot tell whether that is the whole number n, integers decide: it is n if
    n^e = M^k e^(e-k). Differs from T5's code, whose float32 logarithms put some of these distances one bucket lower.
    """
    exact = buckets // 2
    starts = list(range(1, exact + 1))
    for k in range(1, buckets - exact):
        start = exact * (max_distance / exact) ** (k / exact)
        nearest = round(start)
        if abs(start - nearest) > 1e-12 * start:
            starts.append(math.ceil(start))
        else:
            starts.append(nearest + (nearest**exact < max_distance**k * exact ** (exact - k)))
    return np.asarray(starts, np.int32)


def relu_network(
    x: Float[Array, "*n"], a: Float[Array, "width"], b: Float[Array, "width"], out: Float[Array, "width H"]
) -> Float[Array, "H *n"]:
    """A network with one input and one hidden layer: sum_k out_k relu(a_k x + b_k).

    The network is linear between the points where a unit becomes active. One matrix product gives the slope and the
    constant at every x, and one product the gradient of both.
    """
    flat = x.reshape(-1)
    active = (a[:, None] * flat + b[:, None] > 0).astype(jnp.float32)  # [width, N]
    lines = jnp.concatenate([out.T * a, out.T * b])  # [2H, width]
    slope, constant = jnp.split(jnp.matmul(lines, active, precision=jax.lax.Precision.HIGHEST), 2)  # [H, N]
    return (slope * flat + constant).reshape(-1, *x.shape)


def _uniform_within_one(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -1, 1)


def inverse_softplus(x: np.ndarray) -> np.ndarray:
    """The y for which softplus(y) = ln(1 + e^y) is x > 0."""
    return x + np.log(-np.expm1(-x))
