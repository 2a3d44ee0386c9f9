"""A rotary encoding of a trained model whose pairs of tokens have positions of a method of `position_maps`."""

import jax.numpy as jnp

from posenc_jax.encodings.base import Encoding
from posenc_jax.encodings.frequencies import Scaling
from posenc_jax.encodings.reach import HIDDEN
from posenc_jax.encodings.rotary import Rotary


class Mapped(Encoding):
    """Used at evaluation, in place of the `base` with which the model was trained.

    `rotate` returns the rotations of all maps side by side, and `scores` chooses among their products. Memory is linear
    in the length, as for every encoding (`posenc_jax.attention.by_query`).
    """

    rotates_keys_once = True
    causal_only = True

    def __init__(self, base: Rotary, scaling: Scaling, length: int):
        self.base, self.scaling, self.length = base, scaling, length
        self.widths, self.softcap, self.head_factor = base.widths, base.softcap, base.head_factor

    def extend(self, x, positions, state, documents=None):
        own = jnp.broadcast_to(positions, x.shape[:2]).astype(jnp.float32)
        (q_ctx, k_ctx), state = self.base.extend(x, positions, state, documents)
        return ((own, q_ctx), (own, k_ctx)), state

    def rotate(self, q, k, q_pos, k_pos, ctx):
        maps, base_ctx = self.scaling.maps(self.length), (ctx[0][1], ctx[1][1])
        q_pos, k_pos = q_pos.astype(jnp.float32), k_pos.astype(jnp.float32)
        places = [(of_q(q_pos), of_k(k_pos)) for of_q, of_k in zip(maps.queries, maps.keys, strict=True)]
        rotated = (self.base.rotate(q, k, *own, base_ctx) for own in places)
        return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*rotated, strict=True))

    def scores(self, q, k, ctx):
        maps = self.scaling.maps(self.length)
        (i, _), (j, _) = ctx
        chosen = maps.chosen(i[:, :, None], j[:, None])[:, None]
        parts = (jnp.split(x, len(maps.keys), axis=-1) for x in (q, k))
        logits = jnp.full((), HIDDEN, jnp.float32)
        for n, (own_q, own_k) in enumerate(zip(*parts, strict=True)):
            logits = jnp.where(chosen == n, super().scores(own_q, own_k, ctx), logits)
        return logits
