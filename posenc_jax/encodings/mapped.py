"""A rotary encoding of a trained model whose pairs of tokens have positions of a method of `position_maps`."""

import jax.numpy as jnp

from posenc_jax.encodings.base import Encoding
from posenc_jax.encodings.frequencies import Scaling
from posenc_jax.encodings.rotary import Rotary

HIDDEN = -1e9  # a logit that makes a weight exactly zero


class Mapped(Encoding):
    """Used at evaluation, in place of the `base` with which the model was trained.

    `rotate` returns the rotations of all maps side by side, and `scores` chooses among their products. Memory is linear
    in the length, as for every encoding (`posenc_jax.attention.by_query`).
    """

    rotates_keys_once = True
    causal_only = True

    def __init__(self, base: Rotary, scaling: Scaling, length: int):
        self.base, self.scaling, self.length = base, scaling, length
        self.widths, self.softcap = base.widths, base.softcap

    def extend(self, x, positions, state, documents=None):
        own = jnp.broadcast_to(positions, x.shape[:2]).astype(jnp.float32)
        return (own, own), None

    def rotate(self, q, k, q_pos, k_pos, ctx):
        def rotated(x, positions, maps):
            own = positions.astype(jnp.float32)
            return jnp.concatenate([self.base.rotated(x, moved(own)) for moved in maps], axis=-1)

        maps = self.scaling.maps(self.length)
        return rotated(q, q_pos, maps.queries), rotated(k, k_pos, maps.keys)

    def scores(self, q, k, ctx):
        maps = self.scaling.maps(self.length)
        chosen = maps.chosen(ctx[0][:, :, None], ctx[1][:, None])[:, None]
        parts = (jnp.split(x, len(maps.keys), axis=-1) for x in (q, k))
        logits = jnp.full((), HIDDEN, jnp.float32)
        for n, (own_q, own_k) in enumerate(zip(*parts, strict=True)):
            logits = jnp.where(chosen == n, super().scores(own_q, own_k, ctx), logits)
        return logits
