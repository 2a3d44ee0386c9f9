r"""Attention in blocks of queries x keys, in memory linear in the length, for any blockwise bias.

The softmax over a row of logits is built up block by block (Milakov & Gimelshein 2018): with a running maximum m,
normalizer l and unnormalized output a,

.. math:: m' = \max(m, \max_j z_j), \quad l' = e^{m-m'} l + \sum_j e^{z_j-m'},
    \quad a' = e^{m-m'} a + \sum_j e^{z_j-m'} v_j

The backward pass keeps only the output and ln l + m of each row, and computes each block of logits again
(FlashAttention: Dao et al. 2022). Blocks of keys that causal queries cannot see are never visited.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Real

from posenc_jax.encodings.base import CAUSAL, Context, Encoding, Sight, masked
from posenc_jax.matmul import matmul, transposed_matmul

# Letters: n blocks of t queries, m blocks of s keys; H = K G query heads share K heads of keys.
# The block axis comes first, so that one block is one contiguous piece of memory, and the heads come next.


class _Queries(NamedTuple):
    q: Float[Array, "n B H t d"]
    ctx: Any  # leaves [n, B, t, ...]


class _Keys(NamedTuple):
    k: Float[Array, "m B K s d"]
    v: Float[Array, "m B K s e"]
    ctx: Any  # leaves [m, B, s, ...]


class _Positions(NamedTuple):
    q: Real[Array, "n #B t"]
    k: Real[Array, "m #B s"]


def blockwise(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    q_pos: Real[Array, "#B T"],
    k_pos: Real[Array, "#B S"],
    ctx: Context,
    sight: Sight = CAUSAL,
    block: int | None = None,
) -> Float[Array, "B T H e"]:
    """What `dense` computes, for an encoding whose only hook on the logits is a bias that is `blockwise`.

    Gradients reach q, k, v, ctx and the arrays of the encoding. A `block` is so many queries, or keys; by default
    `block_length`.
    """
    B, T, H, _ = q.shape
    S = k.shape[1]
    length = block or block_length(B * H)
    query_blocks, key_blocks = (functools.partial(_blocks, length=min(length, n)) for n in (T, S))
    graphdef, state = nnx.split(encoding)
    out: Array = _attention(
        graphdef,
        _Reach(S - T, S, sight),
        state,
        _Queries(query_blocks(q).swapaxes(2, 3), jax.tree.map(query_blocks, ctx[0])),
        _Keys(key_blocks(k).swapaxes(2, 3), key_blocks(v).swapaxes(2, 3), jax.tree.map(key_blocks, ctx[1])),
        _Positions(query_blocks(q_pos), key_blocks(k_pos)),
    )
    return jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, -1, H, v.shape[-1])[:, :T]


def block_length(rows: int) -> int:
    """Tokens in a block, given how many heads of how many sequences it holds: what stays in a CPU's cache."""
    return 64 if rows > 16 else 128


def _blocks(x: Array, length: int) -> Array:
    """Cut axis 1 into blocks, which come first; the last is filled up with copies of the last token."""
    padding = -x.shape[1] % length
    if padding:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0)


class _Reach(NamedTuple):
    """Query 0 stands at key `offset`, and keys from `keys` on only fill the last block up."""

    offset: int
    keys: int
    sight: Sight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    graphdef: nnx.GraphDef, reach: _Reach, state: Any, queries: _Queries, keys: _Keys, positions: _Positions
) -> Float[Array, "n B H t e"]:
    """Attention of all blocks."""
    return _forward(graphdef, reach, state, queries, keys, positions)[0]


def _forward(graphdef, reach, state, queries, keys, positions):
    n, B, H, t, _ = queries.q.shape
    K, e = keys.v.shape[2], keys.v.shape[-1]

    def attend(i_and_query):
        i, query = i_and_query

        def add_block(j, total):
            out, normalizer, maximum = total
            key = _take(keys, j)
            z = _logits(graphdef, reach, positions, i, j, state, query, key)
            new_maximum = jnp.maximum(maximum, z.max(axis=-1))
            weights = jnp.exp(z - new_maximum[..., None])
            decay = jnp.exp(maximum - new_maximum)
            values = jnp.einsum(
                "bkrs,bkse->bkre",
                weights.reshape(B, K, -1, z.shape[-1]).astype(key.v.dtype),
                key.v,
                preferred_element_type=jnp.float32,
            )
            out = out * decay[..., None] + values.reshape(out.shape)
            return out, normalizer * decay + weights.sum(axis=-1), new_maximum

        zero = jnp.zeros((B, H, t), jnp.float32)
        start = jnp.zeros((B, H, t, e), jnp.float32), zero, zero + jnp.finfo(jnp.float32).min
        first, stop = _visible_blocks(reach, positions, i)
        out, normalizer, maximum = lax.fori_loop(first, stop, add_block, start)
        return (out / normalizer[..., None]).astype(keys.v.dtype), maximum + jnp.log(normalizer)

    out, log_normalizer = lax.map(attend, (jnp.arange(n), queries))
    return out, (state, queries, keys, positions, out, log_normalizer)


def _backward(graphdef, reach, residuals, grad_out):
    state, queries, keys, positions, out, log_normalizer = residuals
    n, B = queries.q.shape[:2]
    K = keys.v.shape[2]
    # What each query's output, as a whole, is worth to the loss: softmax subtracts it from each weight's worth.
    mean_worth = (grad_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)

    def attend(total, block):
        i, query, grad, log_normalizer, mean_worth = block
        grad = grad.reshape(B, K, -1, grad.shape[-1])

        def add_block(j, total):
            d_state, d_query, d_keys = total
            key = _take(keys, j)
            logits = functools.partial(_logits, graphdef, reach, positions, i, j)
            z, pull_back = jax.vjp(logits, state, query, key)
            weights = jnp.exp(z - log_normalizer[..., None])
            worth = jnp.einsum("bkre,bkse->bkrs", grad, key.v, preferred_element_type=jnp.float32)
            d_z = weights * (worth.reshape(z.shape) - mean_worth[..., None])
            d_state_part, d_query_part, d_key = pull_back(d_z)
            d_v = transposed_matmul(weights.reshape(worth.shape).astype(grad.dtype), grad)
            d_keys = jax.tree.map(
                lambda total, part: lax.dynamic_update_index_in_dim(total, total[j] + part.astype(total.dtype), j, 0),
                d_keys,
                d_key._replace(v=d_v),
            )
            return _add(d_state, d_state_part), _add(d_query, d_query_part), d_keys

        d_state, d_keys = total
        first, stop = _visible_blocks(reach, positions, i)
        d_state, d_query, d_keys = lax.fori_loop(first, stop, add_block, (d_state, _zeros(query), d_keys))
        return (d_state, d_keys), d_query

    blocks = (jnp.arange(n), queries, grad_out, log_normalizer, mean_worth)
    (d_state, d_keys), d_queries = lax.scan(attend, (_zeros(state), _zeros(keys)), blocks)
    totals, arrays = (d_state, d_queries, d_keys), (state, queries, keys)
    return *jax.tree.map(lambda total, x: total.astype(x.dtype), totals, arrays), None


_attention.defvjp(_forward, _backward)


def _logits(
    graphdef: nnx.GraphDef,
    reach: _Reach,
    positions: _Positions,
    i: Int[Array, ""],
    j: Int[Array, ""],
    state: Any,
    query: _Queries,
    key: _Keys,
) -> Float[Array, "B H t s"]:
    """Logits of query block i and key block j, with the encoding's bias; the lowest number where the key is ahead."""
    B, H, t, d = query.q.shape
    K, s = key.k.shape[1:3]
    # The queries of all heads that share keys are rows of one matrix product: grouped keys are not repeated.
    rows = query.q.reshape(B, K, -1, d)
    z = matmul(rows, key.k, True, jnp.float32)
    z = z.reshape(B, H, t, s) / math.sqrt(d)
    key_index = j * s + jnp.arange(s)
    mask = reach.sight.mask(reach.offset + i * t + jnp.arange(t), key_index)
    if not reach.sight.causal:  # else they are ahead of every true query
        mask &= key_index < reach.keys
    z = masked(z, mask)
    encoding = nnx.merge(graphdef, state)
    q, k = query.q.swapaxes(1, 2), jnp.repeat(key.k.swapaxes(1, 2), H // K, axis=2)
    bias = encoding.bias(q, k, z, positions.q[i], positions.k[j], (query.ctx, key.ctx))
    return z if bias is None else masked(z + bias, mask)


def _visible_blocks(
    reach: _Reach, positions: _Positions, i: Int[Array, ""]
) -> tuple[Int[Array, ""] | int, Int[Array, ""]]:
    """The first key block with a key that some query of block i may see, and the one after the last."""
    window, t, (m, _, s) = reach.sight.window, positions.q.shape[-1], positions.k.shape
    first = jnp.maximum(reach.offset + i * t - window + 1, 0) // s if window else 0
    stop = jnp.minimum((reach.offset + (i + 1) * t + s - 1) // s, m) if reach.sight.causal else jnp.asarray(m)
    return first, stop


def _take(blocks: Any, j: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: x[j], blocks)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(lambda total, part: total + part, total, part)
