"""Attention a block of queries and a block of keys at a time: exact, and linear in memory.

The softmax is accumulated over blocks (Rabe and Staats 2021; Dao et al. 2022). The backward pass recomputes the logits
of each block from queries, keys and the log-sum-exp of each row, which are all that the forward pass keeps. Blocks
wholly ahead of the queries are never visited. An encoding's bias is evaluated per block and differentiated there, so
learned biases get exact gradients though no [T, S] array exists.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.encodings.base import Context, Encoding, overrides

BLOCK = 128  # queries, and keys, visited together
WRITTEN_OUT = 4  # blocks of queries, up to which the loops over blocks are written out

# The number of a block: known when the program is compiled, or only as it runs.
Index = int | Int[Array, ""]


def blockwise(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S H d"],
    v: Float[Array, "B S H e"],
    q_pos: Int[Array, "#B T"],
    k_pos: Int[Array, "#B S"],
    ctx: Context,
    block: int = BLOCK,
) -> Float[Array, "B T H e"]:
    """What `dense` computes, for an encoding whose only hook on the logits is a bias that is `blockwise`."""
    T, S = q.shape[1], k.shape[1]
    graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)
    plan = _Plan(graphdef if overrides(encoding, "bias") else None, block, T, S)
    q, q_pos, q_ctx = jax.tree.map(plan.padded, (q, q_pos, ctx[0]))
    k, v, k_pos, k_ctx = jax.tree.map(plan.padded, (k, v, k_pos, ctx[1]))
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    trained = (nnx.to_pure_dict(params), q_ctx, k_ctx)
    out = _attend(plan, q, k, v, trained, (nnx.to_pure_dict(constants), q_pos, k_pos))
    return jnp.swapaxes(out, 1, 2)[:, :T]


@dataclass(frozen=True)
class _Plan:
    """What is known when the program is compiled: the structure of the encoding, if it has a bias, and the sizes."""

    graphdef: Any
    block: int
    num_queries: int
    num_keys: int

    @property
    def query_blocks(self) -> int:
        return -(-self.num_queries // self.block)

    def padded(self, x: Array) -> Array:
        """`x` [B, T, ...] with its last row repeated up to a whole number of blocks."""
        width = [(0, 0)] * x.ndim
        width[1] = (0, -x.shape[1] % self.block)
        return jnp.pad(x, width, mode="edge")

    def key_blocks(self, i: Index) -> Index:
        """How many blocks of keys the i-th block of queries sees any key of."""
        end = (i + 1) * self.block
        last = min(end, self.num_queries) if isinstance(i, int) else jnp.minimum(end, self.num_queries)
        return -(-(last + self.num_keys - self.num_queries) // self.block)

    def mask(self, i: Index, j: Index) -> Bool[Array, "b b"]:
        """Which keys of block j the queries of block i see."""
        queries = i * self.block + jnp.arange(self.block) + self.num_keys - self.num_queries
        keys = j * self.block + jnp.arange(self.block)
        return keys[None, :] <= queries[:, None]

    def visit(self, stop: Index, body: Callable[[Index, Any], Any], carry: Any) -> Any:
        """A loop over blocks: `carry = body(i, carry)`, i from 0 to stop - 1."""
        if isinstance(stop, int) and self.query_blocks <= WRITTEN_OUT:
            for i in range(stop):
                carry = body(i, carry)
            return carry
        return jax.lax.fori_loop(0, stop, body, carry)

    def logits(self, q, k, trained, fixed) -> Float[Array, "B H b b"]:
        """Logits of one block, bias included, in float32, from what belongs to its queries and keys."""
        logits = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
        if self.graphdef is None:
            return logits
        (params, q_ctx, k_ctx), (constants, q_pos, k_pos) = trained, fixed
        encoding = nnx.merge(self.graphdef, params, constants)
        return logits + encoding.bias(jnp.swapaxes(q, 1, 2), logits, q_pos, k_pos, (q_ctx, k_ctx))

    def cut(self, i, j, q, k, trained, fixed):
        """The arguments of `logits` for block (i, j)."""
        (params, q_ctx, k_ctx), (constants, q_pos, k_pos) = trained, fixed
        rows, columns = (functools.partial(self.take, index=index, axis=1) for index in (i, j))
        return (
            self.take(q, i, 2),
            self.take(k, j, 2),
            (params, jax.tree.map(rows, q_ctx), jax.tree.map(columns, k_ctx)),
            (constants, rows(q_pos), columns(k_pos)),
        )

    def take(self, x: Array, index: Index, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, index * self.block, self.block, axis)

    def put(self, x: Array, part: Array, index: Index, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, part, index * self.block, axis)

    def add(self, total: Array, part: Array, index: Index, axis: int) -> Array:
        return self.put(total, self.take(total, index, axis) + part, index, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, q, k, v, trained, fixed) -> Float[Array, "B H T e"]:
    return _forward(plan, q, k, v, trained, fixed)[0]


def _forward(plan, q, k, v, trained, fixed):
    batch, heads, length, width = (*q.shape[:3], v.shape[-1])

    def query_block(i, carry):
        out, log_sums = carry

        def key_block(j, carry):
            total, weight, largest = carry
            logits = plan.logits(*plan.cut(i, j, q, k, trained, fixed))
            logits = jnp.where(plan.mask(i, j), logits, -jnp.inf)
            new_largest = jnp.maximum(largest, logits.max(axis=-1))
            weights = jnp.exp(logits - new_largest[..., None])
            kept = jnp.exp(largest - new_largest)
            values = jnp.einsum("bhts,bhse->bhte", weights.astype(v.dtype), plan.take(v, j, 2))
            return total * kept[..., None] + values, weight * kept + weights.sum(axis=-1), new_largest

        start = (
            jnp.zeros((batch, heads, plan.block, width), jnp.float32),
            jnp.zeros((batch, heads, plan.block), jnp.float32),
            jnp.full((batch, heads, plan.block), jnp.finfo(jnp.float32).min),
        )
        total, weight, largest = plan.visit(plan.key_blocks(i), key_block, start)
        own = (total / weight[..., None]).astype(v.dtype)
        return plan.put(out, own, i, 2), plan.put(log_sums, largest + jnp.log(weight), i, 2)

    empty = (jnp.zeros((batch, heads, length, width), v.dtype), jnp.zeros((batch, heads, length), jnp.float32))
    out, log_sums = plan.visit(plan.query_blocks, query_block, empty)
    return out, (q, k, v, trained, fixed, out, log_sums)


def _backward(plan, saved, gradient):
    q, k, v, trained, fixed, out, log_sums = saved
    shares = jnp.einsum("bhte,bhte->bht", gradient, out, preferred_element_type=jnp.float32)

    def query_block(i, totals):
        own, own_log_sums, own_shares = (plan.take(x, i, 2) for x in (gradient, log_sums, shares))

        def key_block(j, totals):
            d_q, d_k, d_v, (d_params, d_q_ctx, d_k_ctx) = totals
            block_q, block_k, block_trained, block_fixed = plan.cut(i, j, q, k, trained, fixed)
            logits, pull = jax.vjp(
                lambda q, k, trained: plan.logits(q, k, trained, block_fixed), block_q, block_k, block_trained
            )
            weights = jnp.where(plan.mask(i, j), jnp.exp(logits - own_log_sums[..., None]), 0)
            values = plan.take(v, j, 2)
            d_weights = jnp.einsum("bhte,bhse->bhts", own, values, preferred_element_type=jnp.float32)
            part_q, part_k, (part_params, part_q_ctx, part_k_ctx) = pull(weights * (d_weights - own_shares[..., None]))
            part_v = jnp.einsum("bhts,bhte->bhse", weights.astype(own.dtype), own)
            rows = functools.partial(plan.add, index=i, axis=1)
            columns = functools.partial(plan.add, index=j, axis=1)
            return (
                plan.add(d_q, part_q, i, 2),
                plan.add(d_k, part_k, j, 2),
                plan.add(d_v, part_v, j, 2),
                (
                    jax.tree.map(jnp.add, d_params, part_params),
                    jax.tree.map(rows, d_q_ctx, part_q_ctx),
                    jax.tree.map(columns, d_k_ctx, part_k_ctx),
                ),
            )

        return plan.visit(plan.key_blocks(i), key_block, totals)

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, k, v, trained))
    totals = plan.visit(plan.query_blocks, query_block, zeros)
    d_q, d_k, d_v, d_trained = jax.tree.map(lambda total, x: total.astype(x.dtype), totals, (q, k, v, trained))
    return d_q, d_k, d_v, d_trained, None


_attend.defvjp(_forward, _backward)
