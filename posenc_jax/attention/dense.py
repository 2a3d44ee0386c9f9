"""Attention with all logits [B, H, T, S] in memory: every hook of an encoding works here."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from posenc_jax.encodings.base import Context, Encoding, masked, seen


def dense(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    q_pos: Real[Array, "#B T"],
    k_pos: Real[Array, "#B S"],
    ctx: Context,
    window: int | None = None,
) -> Float[Array, "B T H e"]:
    """Causal attention of the last T tokens to all S >= T, or to the last `window` keys, in v's dtype.

    Logits and weights are float32.
    """
    T, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2)  # each head of keys serves a group of queries
    mask = seen(jnp.arange(S - T, S), jnp.arange(S), window)
    logits = masked(encoding.scores(q, k, ctx), mask)
    bias = encoding.bias(q, k, logits, q_pos, k_pos, ctx)
    if bias is not None:
        logits = logits + bias
    return encoding.values(encoding.weights(logits, mask).astype(v.dtype), v, q_pos, k_pos, ctx)
