"""Encodings whose gates, computed from the content, decide how fast attention to the past decays."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from posenc_jax.encodings.base import Constant, Dims, DistanceBias, Encoding, Pairwise, full_float32
from posenc_jax.schema import ConfigError, Positive


class FoX(Encoding):
    r"""Forgetting attention: each token's gate scales down the attention of later tokens to earlier ones.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + \sum_{l=j+1}^{i} \ln f_l, \quad f_t = \sigma(w_h \cdot x_t + b_h)

    A constant gate f is ALiBi with slope -ln f. The sum is a difference of float32 cumulative sums. Learned, one set
    per layer: w [D, H], initially LeCun normal, and b [H], initially `bias_init`. Data dependent. Source: Lin et al.
    2025, without its "Pro" block, which is another architecture.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        bias_init: float = 0.0  # b; the gate of a new model is sigmoid(b)

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        bias_init = nnx.initializers.constant(config.bias_init)
        self.gate = nnx.Linear(dims.d_model, dims.num_heads, bias_init=bias_init, rngs=rngs)

    def prepare(self, x, positions):
        total = jnp.cumsum(log_gates(self.gate, x), axis=1)
        return total, total

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return between(*ctx)

    def pairwise(self, q, k, q_pos, k_pos, ctx):
        return Pairwise(lambda query, key, i, j: query[0] - key[0], (ctx[0],), (ctx[1],))


class FoXFixed(DistanceBias):
    r"""Forgetting attention with one constant gate per head, which does not depend on the data.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + (i - j) \ln \sigma(b_h), \quad b_h = -\ln(e^{1/T_h} - 1)

    so that attention of head h decays by 1/e in T_h tokens: ALiBi with slopes 1/T_h. The logarithms of the times are
    spaced evenly over the heads, from `shortest` to `longest`. By default nothing is learned. If `learned`, b [H] is
    learned in each layer, from these initial values. Source: Lin et al. 2025, the data-independent and fixed gates of
    its ablations. Differs from the reference: it has no default times (those here are ours), and its learned form can
    also start at b = 0. Its form without a gate is the encoding "none".
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        shortest: Positive = 2.0  # T of the first head, in tokens
        longest: Positive = 1024.0  # T of the last head, in tokens
        learned: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        if config.longest < config.shortest:
            raise ConfigError("encoding.longest", config.longest, f"must be at least shortest = {config.shortest:g}")
        times = np.geomspace(config.shortest, config.longest, dims.num_heads)
        logits = jnp.asarray(-np.log(np.expm1(1 / times)), jnp.float32)  # [H]
        self.gate = nnx.Param(logits) if config.learned else Constant(logits)

    def distance_bias(self, distance):
        return jnp.multiply.outer(jax.nn.log_sigmoid(self.gate[...]), distance.astype(jnp.float32))


class Wall(Encoding):
    r"""Wall attention: each channel of each head decays at its own rate, which the tokens in between set.

    .. math:: z_{ij} = \sum_c q_{ic}\, k_{jc}\, e^{P_{ic} - P_{jc}} / \sqrt{d},
        \quad P_{tc} = \sum_{l \le t} \ln \sigma(w_c \cdot x_l + b_c)

    Computed in float32, without overflow at any length: for a block of queries the exponent is split at the block's
    first token, so that no factor exceeds 1 for earlier keys. Keys inside the block are computed pair by pair. One gate
    per channel of each query head. Learned, one set per layer: w [D, H d], initially LeCun normal, and b, initially
    `bias_init`. If `forget_gate`, each head also has FoX's gate, with the same initial b. Data dependent. Source: fla's
    layer `WallAttention` (Tilde Research, 2026).
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        bias_init: float = 8.0  # b; the gates of a new model are sigmoid(b)
        forget_gate: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        bias_init = nnx.initializers.constant(config.bias_init)
        width = dims.num_heads * dims.head_dim
        self.heads, self.forget_gate = dims.num_heads, config.forget_gate
        self.channels = nnx.Linear(dims.d_model, width, bias_init=bias_init, rngs=rngs)
        if config.forget_gate:
            self.gate = nnx.Linear(dims.d_model, dims.num_heads, bias_init=bias_init, rngs=rngs)

    def prepare(self, x, positions):
        total = jnp.cumsum(log_gates(self.channels, x), axis=1).reshape(*x.shape[:2], self.heads, -1)
        scalar = jnp.cumsum(log_gates(self.gate, x), axis=1) if self.forget_gate else None
        return (total, scalar), (total, scalar)

    def scores(self, q, k, ctx):
        return faded(q, k, ctx[0][0], ctx[1][0]) / math.sqrt(q.shape[-1])

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return between(ctx[0][1], ctx[1][1]) if self.forget_gate else None


def log_gates(gate: nnx.Linear, x: Float[Array, "B T D"]) -> Float[Array, "B T n"]:
    """Logarithms of the gates of each token, in float32."""
    batch, length, width = x.shape
    return jax.nn.log_sigmoid(gate(x.reshape(-1, width).astype(jnp.float32))).reshape(batch, length, -1)


def between(q_total: Float[Array, "B T H"], k_total: Float[Array, "B S H"]) -> Float[Array, "B H T S"]:
    """The sum of the log gates after each key up to each query, from cumulative sums."""
    return jnp.moveaxis(q_total, -1, 1)[..., :, None] - jnp.moveaxis(k_total, -1, 1)[..., None, :]


@full_float32
def faded(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S H d"],
    q_total: Float[Array, "B T H d"],
    k_total: Float[Array, "B S H d"],
    block: int = 16,
) -> Float[Array, "B H T S"]:
    """Wall's sum over channels for the last T tokens. Values for keys ahead of the query have no meaning."""
    (B, T, H, d), S = q.shape, k.shape[1]
    padding = ((0, 0), (0, -T % block), (0, 0), (0, 0))  # as many keys, so that each block finds its own
    q, k, q_total, k_total = (jnp.pad(x.astype(jnp.float32), padding, mode="edge") for x in (q, k, q_total, k_total))
    blocks = (x.reshape(B, -1, block, H, d).swapaxes(0, 1) for x in (q, q_total))
    starts = S - T + block * jnp.arange(q.shape[1] // block)
    own = jnp.arange(block)[None, :] <= jnp.arange(block)[:, None]

    @jax.checkpoint
    def rows(arguments):
        start, q, total = arguments
        first = total[:, :1]
        earlier = (jnp.arange(k.shape[1]) < start)[:, None, None]
        fading = jnp.exp(jnp.where(earlier, first - k_total, 0))
        z = jnp.einsum("bthd,bshd->bhts", q * jnp.exp(total - first), k * fading)
        near, near_total = (lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, k_total))
        difference = total[:, :, None] - near_total[:, None, :]
        fading = jnp.exp(jnp.where(own[..., None, None], difference, 0))  # [B, t, t, H, d]
        near = jnp.einsum("bthd,bshd,btshd->bhts", q, near, fading)
        return lax.dynamic_update_slice_in_dim(z, near, start, axis=3)

    z = jnp.moveaxis(lax.map(rows, (starts, *blocks)), 0, 2)  # [B, H, n, t, S]
    return z.reshape(B, H, -1, z.shape[-1])[:, :, :T, :S]
