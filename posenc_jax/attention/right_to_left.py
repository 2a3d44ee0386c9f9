"""Attention in blocks of queries x keys for logits that depend on the tokens in between.

Each block of queries visits the blocks of keys from its own position backwards. It carries what the encoding's
`scan_step` needs: a sum over the tokens passed so far, or the queries as these tokens transform them. The softmax
is accumulated as in `blockwise`. The backward pass keeps only the inputs, the result of `scan_keys` for each block of
keys and, for one block of queries at a time, what it carried.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from posenc_jax.attention.blockwise import block_length, no_keys, with_keys
from posenc_jax.attention.by_query import blocks_from_end
from posenc_jax.attention.sinks import with_sinks
from posenc_jax.distributed.parallel import map_query_blocks
from posenc_jax.documents import within_documents
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Encoding, masked


def right_to_left(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask, block: int | None = None
) -> Float[Array, "B T H e"]:
    """What `dense` computes, for an encoding that can `scan_step`; `attention_mask` must be causal.

    Memory is linear in the length, also for gradients. A `block` is so many queries and keys; by default
    `blockwise.block_length`.
    """
    q, k, v, _, _, ctx, sinks, documents = inputs
    q_doc, k_doc = documents or (None, None)
    (B, T, H, _), (S, K, e) = q.shape, v.shape[1:]
    t = block or block_length(B * H)
    both = (q, ctx[0], q_doc), (k, v, ctx[1], k_doc)
    queries, (k, v, k_ctx, k_doc) = jax.tree.map(lambda x: blocks_from_end(x, t), both)
    keys = k, v, k_doc, lax.map(lambda key: jax.checkpoint(encoding.scan_keys)(*key), (k, k_ctx))
    n, m = len(queries[0]), len(k)
    graphdef, arrays = nnx.split(encoding)

    @jax.checkpoint
    def attend(block, shared):
        """The output of the queries that are the tokens of key block `own`, and the logarithms of their normalizers."""
        (own, q, q_ctx, q_doc), (arrays, keys) = block, shared
        encoding = nnx.merge(graphdef, arrays)

        @jax.checkpoint
        def visit(total, j, k, v, k_doc, digest):
            carry, sums = total
            k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
            key_index = j * t + jnp.arange(t)
            mask = attention_mask.materialize(own * t + jnp.arange(t), key_index) & (key_index >= m * t - S)
            mask = within_documents(mask, None if k_doc is None else (q_doc, k_doc))
            carry, z = encoding.scan_step(carry, q, k, mask, (q_ctx, digest))

            def weigh(weights):
                return jnp.einsum("bhts,bshe->bhte", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

            return carry, with_keys(sums, masked(z, mask), weigh)

        def step(total, key):
            nearest = (own - key[0] - 1) * t + 1  # tokens from the block's last key to the first query
            seen = (key[0] <= own) & (nearest < (attention_mask.window or S))
            if q_doc is not None:  # numbers increase: does the last key's document reach any of the first queries?
                seen &= (key[3][:, -1] >= q_doc[:, 0]).any()
            return lax.cond(seen, visit, lambda total, *key: total, total, *key), None

        start = encoding.scan_init(q), no_keys((B, H, t), e)
        (_, (out, normalizer, maximum)), _ = lax.scan(step, start, (jnp.arange(m), *keys), reverse=True)
        return (out / normalizer[..., None]).astype(v.dtype), maximum + jnp.log(normalizer)

    out, log_normalizer = map_query_blocks(attend, (jnp.arange(m - n, m), *queries), (arrays, keys))
    out = jnp.moveaxis(out, (0, 3), (1, 2)).reshape(B, -1, H, e)[:, -T:]
    return with_sinks(out, jnp.moveaxis(log_normalizer, 0, 2).reshape(B, H, -1)[..., -T:], sinks)
