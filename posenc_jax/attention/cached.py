"""Attention of new tokens to cached ones, so that generation computes keys and values once per token."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Real

from posenc_jax.attention.by_query import RealKeys
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import attend_rotated
from posenc_jax.attention.temperature import Temperature
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Encoding, Keys, overrides


@jax.tree_util.register_dataclass
@dataclass
class LayerCache:
    """What one attention layer keeps of the tokens that it has read. `attention` adds tokens to it, in place.

    Arrays have C = `capacity` slots, one per token. `k` holds keys after the encoding's `rotate`, or before it unless
    the encoding `rotates_keys_once`. `ctx` is the context of keys, and `state` that of `Encoding.extend`. These arrays
    are None before the first tokens. Slots from `length` on are empty: their numbers are finite. Heads of keys and
    values come before tokens: then XLA on CPU reads the slots where they are, instead of transposing them in each step.
    """

    capacity: int = field(metadata={"static": True})
    length: int | Int[Array, ""] = 0
    k: Float[Array, "B K C d"] | None = None
    v: Float[Array, "B K C e"] | None = None
    ctx: Any = None
    state: Any = None
    nearby: Float[Array, "B 3 D"] | None = None  # the last inputs of a Canon layer

    def attention(
        self,
        encoding: Encoding,
        q: Float[Array, "B T queries d"],
        k: Keys,
        v: Float[Array, "B T K e"],
        positions: Real[Array, "#B C"],
        mask: AttentionMask,
        *,
        x: Float[Array, "B T D"],
        temperature: Temperature | None = None,
        sinks: Float[Array, "H"] | None = None,
        attend: Callable[..., Array] | None = None,
    ) -> Float[Array, "B T H e"]:
        """Attention of T new tokens to all tokens of the cache and to each other.

        Arguments are those of `dispatch.attention`, where T = S. But `positions` are those of all slots, and `attend`
        serves only the first tokens. A token beyond the capacity replaces the last one: the caller must not add it.
        """
        if self.k is None:
            return self._first(encoding, q, k, v, positions, mask, x, temperature, sinks, attend)
        if overrides(encoding, "update_keys"):
            return self._one_by_one(encoding, q, k, v, positions, mask, x, temperature, sinks)
        return self._next(encoding, q, k, v, positions, mask, x, temperature, sinks)

    def next_positions(self, positions: Real[Array, "#B C"], tokens: int) -> Real[Array, "#B T"]:
        """The positions of the next tokens, from those of all slots."""
        return lax.dynamic_slice_in_dim(positions, self.length, tokens, axis=1)

    def grown(self, capacity: int) -> "LayerCache":
        """The same tokens in a cache with more slots."""
        k, v = jax.tree.map(lambda x: _filled(x, capacity, axis=2), (self.k, self.v))
        ctx = jax.tree.map(lambda x: _filled(x, capacity), self.ctx)
        return replace(self, capacity=capacity, k=k, v=v, ctx=ctx)

    def _first(self, encoding, q, k, v, positions, mask, x, temperature, sinks, attend):
        """The attention of a text without cache; its keys, values and contexts are kept."""
        self.length = jnp.asarray(q.shape[1], jnp.int32)
        own = positions[:, : q.shape[1]]
        ctx, self.state = encoding.extend(x, own, None)
        q, rotated = encoding.rotate(q, k, own, own, ctx)
        kept = rotated if encoding.rotates_keys_once else k
        if overrides(encoding, "update_keys"):
            kept = _updated(encoding, kept, ctx[1])
        self.k, self.v = (_filled(x.swapaxes(1, 2), self.capacity, axis=2) for x in (kept, v))
        self.ctx = jax.tree.map(lambda x: _filled(x, self.capacity), ctx[1])
        inputs = AttentionInputs(q, rotated, v, own, own, ctx, sinks)
        return attend_rotated(encoding, inputs, mask, temperature, attend)

    def _one_by_one(self, encoding, q, k, v, positions, mask, x, temperature, sinks):
        """`_next` for one token after the other, because each token changes the keys before it."""

        def step(cache, token):
            q, k, v, x = (part[:, None] for part in token)
            cache = replace(cache)
            return cache, cache._next(encoding, q, k, v, positions, mask, x, temperature, sinks)[:, 0]

        if q.shape[1] == 1:
            return self._next(encoding, q, k, v, positions, mask, x, temperature, sinks)
        cache, out = lax.scan(step, self, tuple(jnp.moveaxis(part, 1, 0) for part in (q, k, v, x)))
        vars(self).update(vars(cache))
        return jnp.moveaxis(out, 0, 1)

    def _next(self, encoding, q, k, v, positions, mask, x, temperature, sinks):
        assert self.k is not None
        assert self.v is not None
        T, start = q.shape[1], self.length
        own = self.next_positions(positions, T)
        self.length = start + T
        # No slot is further than the last query, for encodings that read all positions.
        everywhere = jnp.where(jnp.arange(self.capacity) < self.length, positions, own[:, -1:])
        (q_ctx, k_ctx), self.state = encoding.extend(x, own, self.state)
        if encoding.rotates_keys_once:
            q, k = encoding.rotate(q, k, own, own, (q_ctx, k_ctx))
        updated = overrides(encoding, "update_keys")
        if updated:
            self.k = encoding.update_keys(self.k.swapaxes(1, 2), k_ctx).swapaxes(1, 2)

        def put(slots, new, axis=1):
            return lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), start, axis)

        self.k, self.v = (put(own, new.swapaxes(1, 2), axis=2) for own, new in ((self.k, k), (self.v, v)))
        self.ctx = jax.tree.map(put, self.ctx, k_ctx)
        k, v = self.k.swapaxes(1, 2), self.v.swapaxes(1, 2)
        if not encoding.rotates_keys_once:
            q, k = encoding.rotate(q, k, own, everywhere, (q_ctx, self.ctx))
        if temperature is not None:
            q = temperature(q, own, mask.window, earlier=start)
        keys: Any = k, v, everywhere, self.ctx
        if overrides(type(encoding), "scores") and not updated:  # which rely on the queries being the last tokens
            empty = self.capacity - self.length
            keys = jax.tree.map(lambda x: jnp.roll(x, empty, axis=1), keys)
            seen = RealKeys(causal=mask.causal, window=mask.window, first=empty)
        else:
            seen = _FromFirst(causal=mask.causal, window=mask.window, first=start)
        k, v, everywhere, k_ctx = keys
        inputs = AttentionInputs(q, k, v, own, everywhere, (q_ctx, k_ctx), sinks)
        return dense(encoding, inputs, seen, updated_keys=updated)


@dataclass(frozen=True, kw_only=True)
class _FromFirst(AttentionMask):
    """The mask of queries that are not the last of the S tokens: token `first` and those after it."""

    first: int | Int[Array, ""] = 0

    def materialize(self, query_index: Int[Array, "T"], key_index: Int[Array, "S"]) -> Bool[Array, "T S"]:
        return super().materialize(query_index - query_index[0] + self.first, key_index)


def _updated(encoding: Encoding, k: Keys, ctx: Any) -> Keys:
    """The keys of a text after all of its tokens have been read, in float32."""

    def read(k, token):
        index, ctx = token
        earlier = jnp.arange(k.shape[1])[:, None, None] < index
        return jnp.where(earlier, encoding.update_keys(k, jax.tree.map(lambda x: x[:, None], ctx)), k), None

    in_order = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), ctx)
    return lax.scan(read, k.astype(jnp.float32), (jnp.arange(k.shape[1]), in_order))[0]


def _filled(x: Array, capacity: int, axis: int = 1) -> Array:
    """An array with empty slots up to a capacity, on the axis of tokens."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, capacity - x.shape[axis])
    return jnp.pad(x, widths)
