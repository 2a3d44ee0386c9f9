"""The additive encodings of GRAPE; its rotations with learned frequencies are RoPE with learned frequencies."""

import math
from dataclasses import dataclass
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from posenc_jax.encodings.base import Constant, Dims, Encoding, distances, visible
from posenc_jax.encodings.bias import alibi_slopes
from posenc_jax.schema import ConfigError, Positive, Range


class GRAPEA(Encoding):
    r"""GRAPE-A, gated by keys: ALiBi whose slope each key sets for itself.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d}
        - (i - j)\, m_h\, \mathrm{softplus}(\omega_h)\, \mathrm{softplus}(u_h \cdot k_j / \sqrt{d})

    with ALiBi's slopes m_h (logits per token). Learned, one set per layer: omega [H], so that softplus(omega) is
    initially `weight`, and u [H, d], initially normal with standard deviation 1/sqrt(d) and divided by its norm where
    `normalize`. Data dependent. Source: GRAPE (ICLR 2026), additive form, and the defaults of the authors' code.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        weight: Positive = 1.0  # of ALiBi's slopes
        normalize: bool = True  # u

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        shape = (dims.num_heads, dims.head_dim)
        self.normalize = config.normalize
        self.slopes = Constant(jnp.asarray(alibi_slopes(dims.num_heads), jnp.float32))
        self.omega = nnx.Param(jnp.full((dims.num_heads,), math.log(math.expm1(config.weight)), jnp.float32))
        self.u = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(dims.head_dim))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        u = self.u[...]
        if self.normalize:
            u = u * lax.rsqrt((u**2).sum(axis=-1, keepdims=True) + 1e-12)
        gates = jax.nn.softplus(jnp.einsum("bshd,hd->bhs", k.astype(jnp.float32), u) / math.sqrt(k.shape[-1]))
        slopes = (self.slopes[...] * jax.nn.softplus(self.omega[...]))[:, None] * gates
        return -slopes[:, :, None, :] * distances(q_pos, k_pos)[:, None].astype(jnp.float32)


class GRAPEAP(Encoding):
    r"""GRAPE-AP: the way from a key to the query costs a sum over the tokens on it, each judged by the query.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + m_h \sum_{l=j+1}^{i} \ln \sigma(p_i \cdot R_l\, \hat p_l / r),
        \quad p = W x

    with ALiBi's slopes m_h, p-hat = p over its root mean square, and R_l the rotation of all pairs (m, m + r/2) by -l
    radians. As only p-hat is rotated, the bias is not relative. Learned, one set per layer: W [D, H r], initially LeCun
    normal. Data dependent. Source: GRAPE (ICLR 2026), path-integral form, as in the authors' code.
    """

    shared = False
    relative = False
    blockwise = False  # a sum over part of a row

    @dataclass(frozen=True)
    class Config:
        width: Annotated[int, Range(at_least=2)] = 8  # r, channels of p in each head

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        if config.width % 2:
            raise ConfigError("encoding.width", config.width, "must be even")
        self.heads = dims.num_heads
        self.slopes = Constant(jnp.asarray(alibi_slopes(dims.num_heads), jnp.float32))
        self.p = nnx.Linear(dims.d_model, dims.num_heads * config.width, use_bias=False, rngs=rngs)

    def prepare(self, x, positions):
        batch, length, width = x.shape
        p = self.p(x.reshape(-1, width).astype(jnp.float32)).reshape(batch, length, self.heads, -1)
        a, b = jnp.split(p * lax.rsqrt((p**2).mean(axis=-1, keepdims=True) + jnp.finfo(jnp.float32).eps), 2, axis=-1)
        angle = positions[:, :, None, None].astype(jnp.float32)
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return p, jnp.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1)

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        costs = jax.nn.log_sigmoid(jnp.einsum("bthr,bshr->bhts", *ctx) / ctx[0].shape[-1])
        costs = jnp.where(visible(logits), self.slopes[:, None, None] * costs, 0)
        following = lax.cumsum(costs, axis=3, reverse=True)
        return jnp.pad(following[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
