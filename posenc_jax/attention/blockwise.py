r"""Attention in blocks of queries x keys, in memory linear in the length, for any blockwise bias.

The softmax over a row of logits is accumulated block by block (Milakov & Gimelshein 2018), with a running maximum m,
normalizer l and unnormalized output a:

.. math:: m' = \max(m, \max_j z_j), \quad l' = e^{m-m'} l + \sum_j e^{z_j-m'},
    \quad a' = e^{m-m'} a + \sum_j e^{z_j-m'} v_j

The backward pass keeps only the output and ln l + m of each row, and computes each block of logits again
(FlashAttention: Dao et al. 2022). Blocks of keys that causal queries cannot see are skipped.

If positions step by one, a `DistanceBias` is computed once per distance, not once per pair. The rows of a block are
then slices of one vector, and each begins one entry after the row below.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Real

from posenc_jax.attention.sinks import with_sinks
from posenc_jax.distributed.parallel import map_query_blocks
from posenc_jax.documents import same_document, within_documents
from posenc_jax.encodings.base import (
    AttentionInputs,
    AttentionMask,
    DistanceBias,
    Encoding,
    bias_of,
    distance_bias_of,
    masked,
)

FEW_ROWS = 16  # sequences x heads
LONG, LONG_FEW_ROWS = 8192, 1024  # keys above which larger blocks are faster, as there are fewer steps

# Letters: n blocks of t queries, m blocks of s keys; H = K G query heads share K heads of keys. The block axis comes
# first, so that a block is contiguous in memory, and the heads come next. Keys, values and contexts have their tokens
# last, as logits do. Then no product of blocks, forward or backward, has a transposed left operand, which XLA on CPU
# would multiply at two thirds of its speed.


class _Queries(NamedTuple):
    q: Float[Array, "n B H t d"]
    ctx: Any  # leaves [n, B, ..., t]


class _Keys(NamedTuple):
    k: Float[Array, "m B K d s"]
    v: Float[Array, "m B K e s"]
    ctx: Any  # leaves [m, B, ..., s]


class _Positions(NamedTuple):
    """Positions, and the numbers of documents if a window holds several."""

    q: Real[Array, "n #B t"]
    k: Real[Array, "m #B s"]
    q_doc: Int[Array, "n B t"] | None = None
    k_doc: Int[Array, "m B s"] | None = None


class _Plan(NamedTuple):
    """What the compiler knows. Query 0 is at the index `offset` of keys. Keys from `keys` on are padding."""

    graphdef: nnx.GraphDef | None  # of the encoding; None: `arrays` are its bias at each of `_distances`
    offset: int
    keys: int
    attention_mask: AttentionMask


def blockwise(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask, block: int | None = None
) -> Float[Array, "B T H e"]:
    """Compute what `dense` computes, for an encoding whose only hook on the logits is a `blockwise` bias.

    Gradients reach q, k, v, ctx and the arrays of the encoding. Arrays that are not differentiated cost nothing.
    `block` is the number of queries, or keys, in a block. The default is `block_length`, or twice that for more keys
    than LONG or, with few rows, LONG_FEW_ROWS.
    """
    q, k, v, q_pos, k_pos, ctx, sinks, documents = inputs
    q_doc, k_doc = documents or (None, None)
    (B, T, H, _), S = q.shape, k.shape[1]
    longest = LONG if B * H > FEW_ROWS else LONG_FEW_ROWS
    length = block or block_length(B * H) * (2 if longest < S else 1)
    query_blocks, key_blocks = (functools.partial(_blocks, length=min(length, n)) for n in (T, S))
    of_queries, of_keys = jax.tree.map(query_blocks, (q_pos, q_doc)), jax.tree.map(key_blocks, (k_pos, k_doc))
    positions = _Positions(of_queries[0], of_keys[0], of_queries[1], of_keys[1])
    if isinstance(encoding, DistanceBias) and attention_mask.contiguous:
        graphdef, arrays = None, jnp.moveaxis(distance_bias_of(encoding, _distances(S - T, positions)), 1, 0)
    else:
        graphdef, state = nnx.split(encoding)
        arrays = nnx.to_pure_dict(state)
    found: Any = _attention(
        _Plan(graphdef, S - T, S, attention_mask),
        arrays,
        _Queries(query_blocks(q).mT, jax.tree.map(query_blocks, ctx[0])),
        _Keys(key_blocks(k), key_blocks(v), jax.tree.map(key_blocks, ctx[1])),
        positions,
    )
    out, log_normalizer = found
    out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, -1, H, v.shape[-1])[:, :T]
    return with_sinks(out, jnp.moveaxis(log_normalizer, 0, 2).reshape(B, H, -1)[..., :T], sinks)


def block_length(rows: int) -> int:
    """The number of tokens in a block with `rows` = sequences x heads, such that it stays in a CPU's cache."""
    return 64 if rows > FEW_ROWS else 128


# a, l and m: the unnormalized output, the normalizer, and the maximum of the logits so far.
Sums = tuple[Float[Array, "*rows e"], Float[Array, "*rows"], Float[Array, "*rows"]]


def no_keys(rows: tuple[int, ...], width: int) -> Sums:
    zero = jnp.zeros(rows, jnp.float32)
    return jnp.zeros((*rows, width), jnp.float32), zero, zero + jnp.finfo(jnp.float32).min


def with_keys(sums: Sums, z: Float[Array, "*rows s"], weigh: Callable[[Array], Array]) -> Sums:
    """Add a block of keys to the sums. `z` are its logits, and `weigh` multiplies weights by its values."""
    out, normalizer, maximum = sums
    new_maximum = lax.stop_gradient(jnp.maximum(maximum, z.max(axis=-1)))
    weights, decay = jnp.exp(z - new_maximum[..., None]), jnp.exp(maximum - new_maximum)
    return out * decay[..., None] + weigh(weights), normalizer * decay + weights.sum(axis=-1), new_maximum


def _blocks(x: Real[Array, "B T *rest"], length: int) -> Real[Array, "n B *rest t"]:
    """Split axis 1 into blocks, on a new first axis. The last block is padded with copies of the last token."""
    padding = -x.shape[1] % length
    if padding:
        x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), (1, 2), (0, -1))


def _distances(offset: int, positions: _Positions) -> Int[Array, "diagonals N"]:
    """The distances in the blocks of each diagonal, the farthest first. Each begins at its last query and first key."""
    (n, _, t), (m, _, s) = positions.q.shape, positions.k.shape
    return offset + n * t - 1 - s * jnp.arange(n + m - 1)[:, None] - jnp.arange(t + s - 1)  # t is s, or n is 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, arrays, queries, keys, positions) -> tuple[Float[Array, "n B H t e"], Float[Array, "n B H t"]]:
    """The output of all blocks, and ln l + m of each row. `arrays` are those of the encoding, or its bias by distance.

    The bias has the shape [diagonals, H, N].
    """
    return _forward(plan, arrays, queries, keys, positions)


def _forward(plan, arrays, queries, keys, positions):
    n, B, H, t, _ = queries.q.shape
    K, e = keys.v.shape[2:4]

    def attend(i_and_query, shared):
        (i, query), (arrays, keys, positions) = i_and_query, shared

        def add_block(j, sums):
            key = _take(keys, j)
            own = _own(plan, arrays, j - i + n - 1)
            z = _logits(plan, positions, i, j, own, query, key, _products(query, key))

            def weigh(weights):
                return _matmul(_by_key_head(weights, K).astype(key.v.dtype), key.v.mT).reshape(B, H, t, e)

            return with_keys(sums, _masked(plan, positions, i, j, z), weigh)

        first, stop = _visible_blocks(plan, positions, i)
        out, normalizer, maximum = lax.fori_loop(first, stop, add_block, no_keys((B, H, t), e))
        return (out / normalizer[..., None]).astype(keys.v.dtype), maximum + jnp.log(normalizer)

    return map_query_blocks(attend, (jnp.arange(n), queries), (arrays, keys, positions))


def _forward_rule(plan, *arguments):
    arrays, *blocks = jax.tree.map(lambda x: x.value, arguments)
    learned = jax.tree.map(lambda x: x.value if x.perturbed else None, arguments[0])
    out, log_normalizer = _forward(plan, arrays, *blocks)
    return (out, log_normalizer), (learned, arrays, *blocks, out, log_normalizer)


def _backward_rule(plan, residuals, grads):
    grad_out, grad_log = map(_instantiated, grads)
    learned, arrays, queries, keys, positions, out, log_normalizer = residuals
    n, (K, d) = queries.q.shape[0], keys.k.shape[2:4]
    # FlashAttention's delta: the sum over keys of each weight times its gradient. That of ln l + m is the weights.
    delta = (grad_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1) - grad_log

    def attend(total, block):
        i, query, grad, log_normalizer, delta = block
        q, grad = _by_key_head(query.q, K), _by_key_head(grad, K)
        q_t, grad_t = lax.optimization_barrier((q.mT, grad.mT))  # transposed here, not in each product

        def add_block(j, total):
            d_learned, d_query, d_keys = total
            key = _take(keys, j)
            own = _own(plan, arrays, j - i + n - 1)

            def logits(learned, *others):
                return _logits(plan, positions, i, j, _with(learned, own), *others)

            own_learned = _own(plan, learned, j - i + n - 1)
            z, pull_back = jax.vjp(logits, own_learned, query, key, _products(query, key))
            weights = jnp.exp(_masked(plan, positions, i, j, z) - log_normalizer[..., None])
            d_weights = _matmul(grad, key.v).reshape(z.shape)
            d_own, d_own_query, d_own_key, d_z = pull_back(weights * (d_weights - delta[..., None]))
            weights, d_z = (_by_key_head(x, K).astype(grad.dtype) for x in (weights, d_z))
            d_q = _matmul(d_z, key.k.mT).reshape(query.q.shape) / math.sqrt(d)
            d_k = _matmul(q_t, d_z) / math.sqrt(d)
            d_query = _add(d_query, d_own_query._replace(q=d_own_query.q + d_q))
            d_key = d_own_key._replace(k=d_own_key.k + d_k, v=_matmul(grad_t, weights))
            add = _add if plan.graphdef is not None else functools.partial(_add_at, j - i + n - 1)
            return add(d_learned, d_own), d_query, _add_at(j, d_keys, d_key)

        d_learned, d_keys = total
        first, stop = _visible_blocks(plan, positions, i)
        d_learned, d_query, d_keys = lax.fori_loop(first, stop, add_block, (d_learned, zeros(query), d_keys))
        return (d_learned, d_keys), d_query

    blocks = (jnp.arange(n), queries, grad_out, log_normalizer, delta)
    (d_learned, d_keys), d_queries = lax.scan(attend, (zeros(learned), zeros(keys)), blocks)
    totals, primals = (d_learned, d_queries, d_keys), (learned, queries, keys)
    return *jax.tree.map(lambda total, x: total.astype(x.dtype), totals, primals), None


_attention.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _products(query: _Queries, key: _Keys) -> Float[Array, "B H t s"]:
    """q . k / sqrt(d). The queries of all heads that share keys are rows of one matrix."""
    B, H, t, d = query.q.shape
    return _matmul(_by_key_head(query.q, key.k.shape[1]), key.k).reshape(B, H, t, -1) / math.sqrt(d)


def _logits(plan, positions, i, j, arrays, query, key, products) -> Float[Array, "B H t s"]:
    """Logits of query block i and key block j. They are finite also for keys that the query may not see."""
    bias: Array | None
    if plan.graphdef is None:
        bias = _toeplitz(arrays, products.shape[2])[None]
    else:
        encoding, groups = nnx.merge(plan.graphdef, arrays), query.q.shape[1] // key.k.shape[1]
        q, k = query.q.swapaxes(1, 2), jnp.repeat(jnp.moveaxis(key.k, -1, 1), groups, axis=2)
        ctx = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 1), (query.ctx, key.ctx))
        seen = _masked(plan, positions, i, j, products)
        bias = bias_of(encoding, q, k, seen, positions.q[i], positions.k[j], ctx)
        if bias is None:
            return products
    return products + (_of_each_sequence(bias, products.shape[0]) if bias.shape[0] == 1 else bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _of_each_sequence(bias: Float[Array, "1 #H t s"], count: int) -> Float[Array, "B #H t s"]:
    """Repeat a bias. Its gradient adds the sequences one by one if they are few, as XLA's sum on CPU is then slow."""
    return jnp.broadcast_to(bias, (count, *bias.shape[1:]))


def _sum_of_sequences(count: int, _: None, grad: Float[Array, "B #H t s"]) -> tuple[Float[Array, "1 #H t s"]]:
    return (functools.reduce(jnp.add, jnp.split(grad, count)) if count <= 16 else grad.sum(axis=0, keepdims=True),)


_of_each_sequence.defvjp(lambda bias, count: (_of_each_sequence(bias, count), None), _sum_of_sequences)


def _toeplitz(bias: Float[Array, "H N"], rows: int) -> Float[Array, "H rows s"]:
    """A block whose last row begins at the first entry, and each other row one entry after the row below."""
    width = bias.shape[1] - rows + 1
    row = functools.partial(lax.dynamic_slice_in_dim, bias, slice_size=width, axis=1)
    return jax.vmap(row, out_axes=1)(jnp.arange(rows)[::-1])


def _masked(
    plan: _Plan, positions: _Positions, i: Array, j: Array, z: Float[Array, "B H t s"]
) -> Float[Array, "B H t s"]:
    """The logits, with the lowest float32 where a query of block i may not see a key of block j."""
    t, s = z.shape[2:]
    first_query, first_key = plan.offset + i * t, j * s
    causal, window = plan.attention_mask.causal, plan.attention_mask.window
    documents = None
    if positions.q_doc is not None and positions.k_doc is not None:
        documents = positions.q_doc[i], positions.k_doc[j]

    def hide(z):
        key_index = first_key + jnp.arange(s)
        mask = plan.attention_mask.materialize(first_query + jnp.arange(t), key_index)
        if not causal:  # else padded keys are ahead of all queries that are not padding
            mask &= key_index < plan.keys
        return masked(z, within_documents(mask, documents))

    whole = first_key + s <= (first_query + 1 if causal else plan.keys)  # every query sees every key
    if window:
        whole &= first_query + t - first_key <= window
    if documents is not None:
        whole &= same_document(*documents).all()
    return lax.cond(whole, lambda z: z, hide, z)


def _visible_blocks(plan: _Plan, positions: _Positions, i: Int[Array, ""]) -> tuple[Array | int, Array]:
    """The first key block that some query of block i may see, and the end of the last one."""
    window, t, (m, _, s) = plan.attention_mask.window, positions.q.shape[-1], positions.k.shape
    first = jnp.maximum(plan.offset + i * t - window + 1, 0) // s if window else 0
    stop = jnp.minimum((plan.offset + (i + 1) * t + s - 1) // s, m) if plan.attention_mask.causal else jnp.asarray(m)
    if positions.q_doc is not None and positions.k_doc is not None:  # their numbers increase
        before = (positions.k_doc[:, :, -1] < positions.q_doc[i][:, 0]).all(axis=1).sum()
        after = (positions.k_doc[:, :, 0] > positions.q_doc[i][:, -1]).all(axis=1).sum()
        first, stop = jnp.maximum(first, before), jnp.minimum(stop, m - after)
    return first, stop


def _own(plan: _Plan, arrays: Any, diagonal: Int[Array, ""]) -> Any:
    """The arrays that the blocks of a diagonal need."""
    return arrays if plan.graphdef is not None else _take(arrays, diagonal)


def _with(learned: Any, arrays: Any) -> Any:
    """The arrays, with the learned ones put in."""
    return jax.tree.map(lambda x, y: y if x is None else x, learned, arrays, is_leaf=lambda x: x is None)


def _by_key_head(x: Float[Array, "B H t d"], heads: int) -> Float[Array, "B K Gt d"]:
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _take(blocks: Any, j: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda x: x[j], blocks)


def zeros(tree: Any) -> Any:
    """Float32 zeros in the shapes of the arrays of a tree."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _instantiated(gradient: Any) -> Array:
    """A gradient as an array, even if it is known to be zero."""
    return jnp.zeros(gradient.shape, jnp.float32) if isinstance(gradient, SymbolicZero) else gradient


def _add(total: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, total, part)


def _add_at(j: Int[Array, ""], total: Any, part: Any) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, x[j] + y, j, 0), total, part)
