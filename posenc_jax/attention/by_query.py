"""Attention of one block of queries at a time, for any encoding, in memory linear in the length."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.attention.dense import dense
from posenc_jax.distributed.parallel import map_query_blocks
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Encoding

# Queries are split into so many parts. Each is compiled for as many keys as its last block sees: 5/8 of all pairs.
PARTS = 4


def by_query(
    encoding: Encoding,
    inputs: AttentionInputs,
    attention_mask: AttentionMask,
    block: int | None = None,
    function: Callable[..., Array] = dense,
) -> Float[Array, "B T *rest"]:
    """Compute what `dense`, or another `function` of the same arguments, computes, for any encoding.

    The hooks get whole rows of logits, for one block of queries at a time, and again in the backward pass. `block` is
    the number of queries in a block; the default is `block_length`.
    """
    q, k, v, q_pos, k_pos, ctx, sinks, documents = inputs
    q_doc, k_doc = documents or (None, None)
    (B, T, H, _), S = q.shape, k.shape[1]
    t = block or block_length(B * H * S)
    queries = jax.tree.map(lambda x: blocks_from_end(x, t), (q, q_pos, ctx[0], q_doc))
    blocks = -(-T // t)
    graphdef, arrays = nnx.split(encoding)
    # The end of the keys of each block: after its last query or, if it sees keys ahead, after the last key.
    ends = [S - t * later if attention_mask.causal else S for later in reversed(range(blocks))]

    def attend(queries: Any, ends: list[int]) -> Float[Array, "n B t *rest"]:
        """The results of neighbouring blocks. Each gets as many keys as the last of them sees."""
        extent = max(t, min(ends[-1], t - 1 + attention_mask.window if attention_mask.window else S))
        begin = ends[0] - extent
        own = slice(max(begin, 0), ends[-1])
        keys = jax.tree.map(lambda x: _padded(x[:, own], max(-begin, 0)), (k, v, k_pos, ctx[1], k_doc))

        @jax.checkpoint
        def attend_block(block, shared):
            ((q, q_pos, q_ctx, q_doc), end), (arrays, keys, sinks) = block, shared
            start, encoding = end - ends[0], nnx.merge(graphdef, arrays)
            k, v, k_pos, k_ctx, k_doc = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, extent, axis=1), keys)
            real = RealKeys(causal=attention_mask.causal, window=attention_mask.window, first=extent - end)
            documents = None if q_doc is None else (q_doc, k_doc)
            return function(encoding, AttentionInputs(q, k, v, q_pos, k_pos, (q_ctx, k_ctx), sinks, documents), real)

        return map_query_blocks(attend_block, (queries, jnp.asarray(ends)), (arrays, keys, sinks))

    part = -(-blocks // PARTS)
    parts = [slice(first, first + part) for first in range(0, blocks, part)]
    out = jnp.concatenate([attend(jax.tree.map(itemgetter(own), queries), ends[own]) for own in parts])
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, *out.shape[3:])[:, -T:]


def block_length(row: int) -> int:
    """The number of queries with 16 MiB of logits, from 16 to 128. `row` is the number of logits of one query."""
    return min(max(2**22 // row, 16), 128)


@dataclass(frozen=True, kw_only=True)
class RealKeys(AttentionMask):
    """A mask that also hides the keys before `first`, which are padding."""

    first: int | Int[Array, ""] = 0

    def materialize(self, query_index: Int[Array, "T"], key_index: Int[Array, "S"]) -> Bool[Array, "T S"]:
        return super().materialize(query_index, key_index) & (key_index >= self.first)


def _padded(x: Array, front: int) -> Array:
    """Pad axis 1 in front with copies of the first token, which every encoding can compute with."""
    return jnp.pad(x, [(0, 0), (front, 0)] + [(0, 0)] * (x.ndim - 2), mode="edge") if front else x


def blocks_from_end(x: Array, length: int) -> Array:
    """Split axis 1 into blocks, on a new first axis. The first block is padded with copies of the first token."""
    x = _padded(x, -x.shape[1] % length)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, length, *x.shape[2:]), 1, 0)
