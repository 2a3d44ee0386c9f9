"""Encodings whose effect on a logit depends on the query or on other logits."""

import functools
import math
from dataclasses import dataclass, field
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Real

from posenc_jax import encodings
from posenc_jax.encodings.base import Base, Dims, Encoding, constant, distances, masked, overrides, visible
from posenc_jax.encodings.reach import HardALiBi
from posenc_jax.schema import ConfigError, Count, Positive, Range


class Shaw(Encoding):
    r"""Relative position representations: a learned vector per distance, added to each key and to each value.

    .. math:: z_{ij} = q_i \cdot (k_j + a^K_n) / \sqrt{d}, \quad
        o_i = \sum_j \mathrm{softmax}(z)_{ij}\, (v_j + a^V_n), \quad n = \min(i - j, k)

    with k = `max_distance` (tokens). Fractional distances are rounded down. Learned, one set per layer shared by its
    heads: a^K and, if `values`, a^V, each [k + 1, d], initially Glorot uniform as in Tensor2Tensor. Depends on the
    query. The sum over values first adds up the weights of each n, so that no vector is formed per query and key.
    Source: Shaw et al. 2018, §3. Differs from the reference: it has no vectors for keys ahead, as the causal mask hides
    those keys.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        max_distance: Count = 16
        values: bool = True

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        init, shape = nnx.initializers.glorot_uniform(), (config.max_distance + 1, dims.head_dim)
        self.key_table = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.value_table = nnx.Param(init(rngs.params(), shape, jnp.float32)) if config.values else None

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        at_distance = jnp.einsum("bthd,nd->bhtn", q.astype(jnp.float32), self.key_table[...]) / math.sqrt(q.shape[-1])
        return jnp.take_along_axis(at_distance, self._clipped(q_pos, k_pos)[:, None], axis=-1)

    def values(self, weights, v, q_pos, k_pos, ctx):
        out = super().values(weights, v, q_pos, k_pos, ctx)
        if self.value_table is None:
            return out
        batch, head, query, _ = jnp.indices(weights.shape, sparse=True)
        total = jnp.zeros((*weights.shape[:-1], self.value_table.shape[0]), jnp.float32)
        total = total.at[batch, head, query, self._clipped(q_pos, k_pos)[:, None]].add(weights.astype(jnp.float32))
        return out + jnp.einsum("bhtn,nd->bthd", total, self.value_table[...]).astype(out.dtype)

    def _clipped(self, q_pos: Array, k_pos: Array) -> Int[Array, "#B T S"]:
        return jnp.clip(distances(q_pos, k_pos), 0, self.key_table.shape[0] - 1).astype(jnp.int32)


class TransformerXL(Encoding):
    r"""Transformer-XL: each query is multiplied with the key and with a projected sinusoid of the distance.

    .. math:: z_{ij} = \big((q_i + u) \cdot k_j + (q_i + v) \cdot W_R\, r_{i-j}\big) / \sqrt{d}, \quad
        r_n = [\sin(n\,\theta_m)]_m \oplus [\cos(n\,\theta_m)]_m, \quad \theta_m = base^{-2m/D}

    sin and cos of (i - j) theta are sums of products of those of i theta and of j theta. The second term is therefore a
    dot product of two vectors of width D: the projected query, rotated by its position, and the sinusoid of the key's
    position. Queries and keys are widened from d to d + D, and no r is looked up for a pair of tokens. Learned, one set
    per layer: u and v [H, d], initially normal with standard deviation 0.02, and W_R [H, d, D], initially LeCun normal.
    Depends on the query. Source: Dai et al. 2019, §3.3; u and v per layer are `untie_r` of the authors' code, as in
    their published models. Differs from the reference: it has no `clamp_len`, and no memory of earlier segments, which
    is not part of the encoding.
    """

    shared = False
    rotates_keys_once = True

    @dataclass(frozen=True)
    class Config:
        base: Base = 10000.0

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        theta = config.base ** (-np.arange(0, dims.d_model, 2, dtype=np.float64) / dims.d_model)
        self.inverse_frequencies = constant(theta)  # [D/2] radians per token
        shape, width = (dims.num_heads, dims.head_dim), 2 * len(theta)
        self.content_bias = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))  # u
        self.position_bias = nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))  # v
        self.projection = nnx.Param(jax.random.normal(rngs.params(), (*shape, width), jnp.float32) / math.sqrt(width))

    def rotate(self, q, k, q_pos, k_pos, ctx):
        (q_sin, q_cos), (k_sin, k_cos) = self._waves(q_pos), self._waves(k_pos)
        query = q.astype(jnp.float32)
        projected = jnp.einsum("bthd,hdc->bthc", query + self.position_bias[...], self.projection[...])
        of_sin, of_cos = jnp.split(projected, 2, axis=-1)  # what a sine, and a cosine, of i - j adds to the logit
        turned = of_cos * q_sin - of_sin * q_cos, of_sin * q_sin + of_cos * q_cos
        wide_q = jnp.concatenate([query + self.content_bias[...], *turned], axis=-1)
        waves = (jnp.broadcast_to(wave, (*k.shape[:-1], wave.shape[-1])).astype(k.dtype) for wave in (k_sin, k_cos))
        # The logits will be divided by the square root of the new width.
        wide_q = wide_q * math.sqrt(wide_q.shape[-1] / q.shape[-1])
        return wide_q.astype(q.dtype), jnp.concatenate([k, *waves], axis=-1)

    def _waves(self, positions: Real[Array, "#B T"]) -> tuple[Float[Array, "#B T 1 c"], Float[Array, "#B T 1 c"]]:
        angles = positions[..., None, None].astype(jnp.float32) * self.inverse_frequencies[...]
        return jnp.sin(angles), jnp.cos(angles)


class DeBERTa(Encoding):
    r"""Disentangled attention: queries also match vectors of relative positions, and such vectors match keys.

    .. math:: z_{ij} = \big(q_i \cdot k_j + q_i \cdot W_K P_{\delta(i,j)} + k_j \cdot W_Q P_{\delta(j,i)}\big)
        / \sqrt{3d}, \quad \delta(i,j) = \min(\max(i - j + m,\, 0),\, 2m - 1)

    with m = `max_distance` (tokens), by default the training length. All keys at least m - 1 tokens behind the query
    have one vector, and so have those at least m tokens ahead. Fractional distances are rounded down. Each block of
    queries and its keys are multiplied with all 2m vectors, which takes longer than attention itself if m is large.
    Learned, one set per layer: P [2m, D], initially normal with standard deviation 0.02; W_K and W_Q [D, H d],
    initially LeCun normal. Depends on queries and keys. Source: He et al. 2021 (DeBERTa), §3.1, where m = 512. Differs
    from the paper: there, all layers share P. The absolute positions that DeBERTa adds before its output are not here.
    Differs from Microsoft's code: that has delta(i, j) in both terms. Its later versions (v2, v3) project P with the
    layer's own query and key projections, normalise P, and have logarithmic buckets of distances.
    """

    shared = False
    both_ways = True

    @dataclass(frozen=True)
    class Config:
        max_distance: Annotated[int, Range(at_least=0, at_most=2**20)] = 0  # m, in tokens; 0: the training length

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        rows, inner = 2 * (config.max_distance or dims.max_length), dims.num_heads * dims.head_dim
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, dims.d_model), jnp.float32))
        self.of_keys = nnx.Linear(dims.d_model, inner, use_bias=False, rngs=rngs)  # W_K
        self.of_queries = nnx.Linear(dims.d_model, inner, use_bias=False, rngs=rngs)  # W_Q

    def scores(self, q, k, ctx):
        return super().scores(q, k, ctx) / math.sqrt(3)

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        def products(x: Float[Array, "B n H d"], projection: nnx.Linear) -> Float[Array, "B H n rows"]:
            vectors = projection(self.table[...]).reshape(-1, *x.shape[2:])
            return jnp.einsum("bnhd,phd->bhnp", x.astype(jnp.float32), vectors) / math.sqrt(3 * x.shape[-1])

        distance = distances(q_pos, k_pos)
        of_queries, of_keys = products(q, self.of_keys), products(k, self.of_queries)
        matched = jnp.take_along_axis(of_keys, self._row(-distance).mT[:, None], axis=-1).mT
        return jnp.take_along_axis(of_queries, self._row(distance)[:, None], axis=-1) + matched

    def _row(self, distance: Real[Array, "B T S"]) -> Int[Array, "B T S"]:
        rows = self.table.shape[0]
        return jnp.clip(jnp.floor(distance) + rows // 2, 0, rows - 1).astype(jnp.int32)


class TAPA(Encoding):
    r"""Token-aware phase attention: a logit oscillates with the distance, at a rate that query and key set.

    .. math:: z_{ij} = \frac{q^A_i \cdot k^A_j}{\sqrt{a}}
        \cos\Big(2\pi\, |i - j|^{\alpha}\, \frac{q^P_i \cdot k^P_j}{\sqrt{d - a}}\Big)

    The first a = fraction * d channels of a head are q^A and k^A, which set the amplitude. The others are q^P and k^P,
    which set the phase (radians). Distances are in tokens, and alpha is `exponent`. With the default the phase at
    100,000 tokens is 3.2 times that at 1 token. It multiplies the rounding of queries and keys, so that bfloat16
    changes logits more than in other encodings. Nothing is learned. Data dependent. Source: Wang et al. 2025 (TAPA),
    §3, with the settings of the experiments.
    """

    both_ways = True

    @dataclass(frozen=True)
    class Config:
        fraction: Annotated[float, Range(above=0, below=1)] = 0.5  # of a head's channels, which set the amplitude
        exponent: Positive = 0.1  # alpha

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.amplitude, self.exponent = int(config.fraction * dims.head_dim), config.exponent
        if self.amplitude < 1:
            allowed = f"must leave at least 1 channel of head_dim = {dims.head_dim} for the amplitude"
            raise ConfigError("encoding.fraction", config.fraction, allowed)

    def extend(self, x, positions, state, documents=None):
        own = jnp.broadcast_to(positions, x.shape[:2]).astype(jnp.float32)
        return (own, own), None

    def scores(self, q, k, ctx):
        distance = jnp.abs(ctx[0][:, :, None] - ctx[1][:, None])[:, None]
        (q_amplitude, q_phase), (k_amplitude, k_phase) = (jnp.split(x, [self.amplitude], axis=-1) for x in (q, k))
        turns = distance**self.exponent * super().scores(q_phase, k_phase, ctx)
        return super().scores(q_amplitude, k_amplitude, ctx) * jnp.cos(2 * jnp.pi * turns)


class CoPE(Encoding):
    r"""Contextual position encoding: a key's position is the sum of the query's gates over the tokens since the key.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + q_i \cdot e[p_{ij}], \quad
        p_{ij} = \min\Big(\sum_{l=j}^{i} \sigma(q_i \cdot k_l / \sqrt{d}),\, P - 1\Big)

    with P = `positions`. Between whole positions q . e is interpolated. The positions that the model is given are not
    read; only the order of tokens counts. Learned, one set per layer shared by its heads: e [P, d], initially 0. Data
    dependent. Source: Golovneva et al. 2024. As in the authors' code, gates are of logits divided by sqrt(d).
    """

    shared = False
    blockwise = False  # a sum over part of a row

    @dataclass(frozen=True)
    class Config:
        positions: Annotated[int, Range(at_least=2)] = field(default=64, metadata={"alternative": 4})

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.table = nnx.Param(jnp.zeros((config.positions, dims.head_dim), jnp.float32))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        gates = jax.nn.sigmoid(logits)  # 0 where the query may not see the key
        return self._at(jax.lax.cumsum(gates, axis=3, reverse=True), q)

    def scan_step(self, carry, q, k, mask, ctx):
        logits = masked(self.scores(q, k, ctx), mask)
        gates = jax.nn.sigmoid(logits)
        position = carry[..., None] + jax.lax.cumsum(gates, axis=3, reverse=True)
        return position[..., 0], logits + self._at(position, q)

    def _at(self, position: Float[Array, "B H T S"], q: Float[Array, "B T H d"]) -> Float[Array, "B H T S"]:
        """The products of queries with the vectors at these positions."""
        last = self.table.shape[0] - 1
        position = jnp.minimum(position, last)
        at_whole = jnp.einsum("bthd,pd->bhtp", q.astype(jnp.float32), self.table[...])
        below = position.astype(jnp.int32)
        low, high = (jnp.take_along_axis(at_whole, p, axis=-1) for p in (below, jnp.minimum(below + 1, last)))
        return low + (position - below) * (high - low)


class DAPE(Encoding):
    r"""Data-adaptive encoding: a network corrects the bias of another encoding from the logits of all heads.

    .. math:: z_{ij} = s_{ij} + b_{ij} + f_\theta(s_{ij}, b_{ij}), \quad s_{ij} = q_i \cdot k_j / \sqrt{d}

    where s and b hold all H heads. b is the bias of `base`, an encoding of the table that is only a bias, with its
    default hyper-parameters. Learned, one set per layer: the parameters of `base`, and the network f of two layers (2H
    inputs, `width` leaky ReLU of slope 0.01, H outputs) with kernels initially LeCun normal and constants 0. Data
    dependent; relative if `base` is. Source: Zheng et al. 2024 (DAPE). Differs from the reference: as in `FIRE`, the
    second layer has no constant.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        base: str = field(default="alibi", metadata={"alternative": "kerple"})
        width: Count = 32

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        self.base = build_base(config.base, dims, rngs)
        self.hidden = nnx.Linear(2 * dims.num_heads, config.width, rngs=rngs)
        self.out = nnx.Linear(config.width, dims.num_heads, use_bias=False, rngs=rngs)

    @property
    def cacheable(self):
        return self.base.cacheable

    @property
    def packable(self):
        return self.base.packable

    def extend(self, x, positions, state, documents=None):
        return self.base.extend(x, positions, state, **({} if documents is None else {"documents": documents}))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        base = self.base.bias(q, k, logits, q_pos, k_pos, ctx)
        assert base is not None  # as `only_bias` made sure
        base = jnp.broadcast_to(base, logits.shape)
        seen = visible(logits)
        inputs = jnp.concatenate([jnp.where(seen, x, 0) for x in (logits, base)], axis=1)
        correction = self._network(jnp.moveaxis(inputs, 1, -1), seen[:, 0, :, :, None])
        return base + jnp.moveaxis(correction, -1, 1)

    def _network(self, inputs: Array, seen: Bool[Array, "B T S 1"]) -> Float[Array, "B T S outputs"]:
        hidden = jax.nn.leaky_relu(self.hidden(inputs.reshape(-1, inputs.shape[-1])))
        return self.out(hidden).reshape(*seen.shape[:-1], -1)


class DAPEV2(DAPE):
    r"""DAPE version 2: the network that corrects the bias is a convolution over keys.

    .. math:: z_{ij} = s_{ij} + b_{ij} + f_\theta\big(s_{i,\,j-r:j+r},\, b_{i,\,j-r:j+r}\big), \quad
        s_{ij} = q_i \cdot k_j / \sqrt{d}

    As in `DAPE`, but both layers of f are convolutions over keys of width `kernel`, so that r = kernel - 1. Inputs and
    the hidden layer are 0 for keys that the query may not see. Data dependent; relative if `base` is. Source: Zheng et
    al. 2024 (DAPE V2). Differs from the reference: there only the inputs are 0, and the hidden layer at the key after
    the query is 0 only if the text ends there. The logits then depend on whether the text goes on, but on no later
    token.
    """

    blockwise = False  # keys of neighbouring blocks

    @dataclass(frozen=True)
    class Config(DAPE.Config):
        kernel: Count = field(default=3, metadata={"alternative": 5})

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        if config.kernel % 2 == 0:
            raise ConfigError("encoding.kernel", config.kernel, "must be odd")
        conv = functools.partial(nnx.Conv, kernel_size=(config.kernel,), padding="SAME", rngs=rngs)
        self.base = build_base(config.base, dims, rngs)
        self.hidden = conv(2 * dims.num_heads, config.width)
        self.out = conv(config.width, dims.num_heads, use_bias=False)

    def _network(self, inputs, seen):
        rows, seen_rows = (x.reshape(-1, *x.shape[2:]) for x in (inputs, seen))
        hidden = jax.nn.leaky_relu(convolved(self.hidden, rows)) * seen_rows
        return convolved(self.out, hidden).reshape(*seen.shape[:-1], -1)


def convolved(conv: nnx.Conv, x: Float[Array, "R S inputs"]) -> Float[Array, "R S outputs"]:
    """A convolution over S, as one matrix product of stacked neighbours. XLA's own takes far longer on a CPU."""
    kernel = conv.kernel[...]
    wide, length = len(kernel), x.shape[1]
    padded = jnp.pad(x, [(0, 0), (wide // 2, wide // 2), (0, 0)])
    near = jnp.concatenate([padded[:, i : i + length] for i in range(wide)], axis=-1)
    product = near.reshape(-1, near.shape[-1]) @ kernel.reshape(near.shape[-1], -1)
    if conv.bias is not None:
        product += conv.bias[...]
    return product.reshape(*x.shape[:2], -1)


def build_base(name: str, dims: Dims, rngs: nnx.Rngs) -> Encoding:
    """The encoding whose bias DAPE corrects, at its defaults. Raises ConfigError."""
    if name not in encodings.names() or not only_bias(encodings.load(name)):
        allowed = [name for name in encodings.names() if only_bias(encodings.load(name))]
        raise ConfigError("encoding.base", name, "must be one of: " + ", ".join(allowed), allowed)
    return encodings.build(name, dims, rngs)


def only_bias(cls: type[Encoding]) -> bool:
    """Whether an encoding overrides only `bias` and `prepare`, hides no key, and is computed block by block."""
    others = overrides(cls, "embed", "rotate", "scores", "weights", "values")
    return cls.blockwise and overrides(cls, "bias") and not others and not issubclass(cls, (DAPE, HardALiBi))
