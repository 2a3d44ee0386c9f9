"""Encodings whose logits contain a product of content-dependent matrices between the key and the query."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from posenc_jax.encodings.base import Dims, Encoding, full_float32
from posenc_jax.encodings.convolution import causal_convolution
from posenc_jax.encodings.gated import between, log_gates
from posenc_jax.schema import Count, Range


class PaTH(Encoding):
    r"""PaTH attention: each token between key and query applies a partial reflection along its own direction.

    .. math:: z_{ij} = q_i^T H_i H_{i-1} \cdots H_{j+1} k_j / \sqrt{d}, \quad H_t = I - \beta_t w_t w_t^T,
        \quad \beta_t = 2\,\sigma(b \cdot x_t + c), \quad w_t = \mathrm{unit}(\mathrm{silu}(\mathrm{conv}(W x)_t))

    With tokens as the rows of W, Q and K, z = QK' - tril(QW') diag(beta) (I + stril(WW') diag(beta))^-1 stril(WK'),
    which is a triangular solve in float32. Each head of keys has one w and beta. Learned, one set per layer: W of rank
    `rank` and b, initially LeCun normal; c, initially 0; and a depthwise causal convolution over `conv_width` tokens,
    initially uniform within 1/sqrt(conv_width). `forget_gate` = "added" adds FoX's sum of log gates to z, as FoX does.
    "scaled" adds it to q^T H .. H k, before the division by sqrt(d), as fla does in training and decoding. Data
    dependent. Source: Yang et al. 2025, whose equations have no 1/sqrt(d) for the logits or the gates.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        rank: Count = 32  # of the projection to w
        conv_width: Annotated[int, Range(at_least=1, at_most=256)] = 3  # tokens
        forget_gate: Literal["none", "added", "scaled"] = "none"

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        inner = dims.num_kv_heads * dims.head_dim
        self.heads, self.forget_gate = dims.num_kv_heads, config.forget_gate
        self.down = nnx.Linear(dims.d_model, config.rank, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.rank, inner, use_bias=False, rngs=rngs)
        limit = 1 / math.sqrt(config.conv_width)
        shape = (config.conv_width, inner)
        self.conv = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit))
        self.beta = nnx.Linear(dims.d_model, dims.num_kv_heads, rngs=rngs)
        if config.forget_gate != "none":
            self.gate = nnx.Linear(dims.d_model, dims.num_heads, rngs=rngs)

    def prepare(self, x, positions):
        batch, length, width = x.shape
        flat = x.reshape(-1, width).astype(jnp.float32)
        w = self.up(self.down(flat)).reshape(batch, length, -1)
        w = jax.nn.silu(causal_convolution(w, self.conv[...]))
        w = w.reshape(batch, length, self.heads, -1)
        w = w * lax.rsqrt((w**2).sum(axis=-1, keepdims=True) + 1e-6)
        beta = 2 * jax.nn.sigmoid(self.beta(flat)).reshape(batch, length, -1)  # [B, T, K]
        total = None if self.forget_gate == "none" else jnp.cumsum(log_gates(self.gate, x), axis=1)
        return total, (w, beta, total)

    @full_float32
    def scores(self, q, k, ctx):
        w, beta, _ = ctx[1]
        (length, keys), groups = (q.shape[1], k.shape[1]), q.shape[2] // w.shape[2]
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        beta = jnp.moveaxis(beta, 1, 2)[:, :, None, :]  # [B, K, 1, S]
        overlap = jnp.einsum("bthd,bshd->bhts", w, w) * beta
        right = jnp.tril(jnp.einsum("bthd,bshd->bhts", w, k[:, :, ::groups]), -1)
        # Row t, column j: what w_t finds of key j after the tokens in between.
        found = solve_unit_lower(overlap, right)
        w, found = jnp.repeat(w, groups, axis=2), jnp.repeat(beta.swapaxes(2, 3) * found, groups, axis=1)
        passed = jnp.tril(jnp.einsum("bthd,bshd->bhts", q, w), keys - length)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) - passed @ found
        return logits / math.sqrt(q.shape[-1])

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return None if self.forget_gate == "none" else self._forgotten(ctx[0], ctx[1][2], q.shape[-1])

    def scan_init(self, q):
        return q.astype(jnp.float32).swapaxes(1, 2)

    @full_float32
    def scan_keys(self, k, ctx):
        w, beta, total = ctx
        w, k, beta = w.swapaxes(1, 2), k.astype(jnp.float32).swapaxes(1, 2), jnp.moveaxis(beta, 1, 2)
        right = jnp.concatenate([jnp.tril(w @ k.mT, -1), w], axis=-1)
        found = beta[..., None] * solve_unit_lower(w @ w.mT * beta[..., None, :], right)
        return w, found, total

    @full_float32
    def scan_step(self, carry, q, k, mask, ctx):
        w, found, total = ctx[1]
        groups = q.shape[2] // w.shape[1]
        w, found = (jnp.repeat(x, groups, axis=1) for x in (w, found))
        passed = jnp.where(mask, carry @ w.mT, 0) @ found
        of_keys, of_query = jnp.split(passed, [k.shape[1]], axis=-1)
        logits = (carry @ k.astype(jnp.float32).swapaxes(1, 2).mT - of_keys) / math.sqrt(q.shape[-1])
        if self.forget_gate != "none":
            logits = logits + self._forgotten(ctx[0], total, q.shape[-1])
        return carry - of_query, logits

    def _forgotten(
        self, q_total: Float[Array, "B T H"], k_total: Float[Array, "B S H"], head_dim: int
    ) -> Float[Array, "B H T S"]:
        total = between(q_total, k_total)
        return total / math.sqrt(head_dim) if self.forget_gate == "scaled" else total


def solve_unit_lower(
    matrix: Float[Array, "*batch S S"], right: Float[Array, "*batch S n"], block: int = 16
) -> Float[Array, "*batch S n"]:
    """Solve (I + L) X = R, where L is the strictly lower part of a matrix, by substitution of blocks of rows.

    It uses only matrix products. A training step of 256 tokens with XLA's own solve on CPU (jaxlib 0.10.2) did not
    return within an hour on two devices, nor within six minutes on one.
    """
    size = right.shape[-2]
    padding = [(0, 0)] * (matrix.ndim - 2)
    matrix = jnp.pad(jnp.tril(matrix, -1), [*padding, (0, -size % block), (0, -size % block)])
    right = jnp.pad(right, [*padding, (0, -size % block), (0, 0)])
    rows = jnp.moveaxis(matrix.reshape(*matrix.shape[:-2], -1, block, matrix.shape[-1]), -3, 0)
    rights = jnp.moveaxis(right.reshape(*right.shape[:-2], -1, block, right.shape[-1]), -3, 0)
    starts = block * jnp.arange(len(rows))
    own = jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, block, axis=-1))(rows, starts)
    inverse = jnp.broadcast_to(jnp.eye(block), own.shape)
    for i in range(1, block):  # the inverse of every diagonal block, row after row
        inverse = inverse.at[..., i, :i].set(-jnp.einsum("...j,...jk->...k", own[..., i, :i], inverse[..., :i, :i]))

    def substitute(solved, arguments):
        start, row, right, inverse = arguments
        found = inverse @ (right - row @ solved)  # rows from `start` on are still 0
        return lax.dynamic_update_slice_in_dim(solved, found, start, axis=-2), None

    return lax.scan(substitute, jnp.zeros_like(right), (starts, rows, rights, inverse))[0][..., :size, :]
