"""Attention with all logits [B, H, T, S] in memory: every hook of an encoding works here."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from posenc_jax.encodings.base import CAUSAL, AttentionInputs, AttentionMask, Encoding, bias_of, masked


def dense(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask = CAUSAL
) -> Float[Array, "B T H e"]:
    """Attention of the last T of S tokens to the keys that `attention_mask` lets them see, in the dtype of `v`."""
    q, _, v, q_pos, k_pos, ctx = inputs
    weights = attention_weights(encoding, inputs, attention_mask).astype(v.dtype)
    return encoding.values(weights, _per_query_head(v, q), q_pos, k_pos, ctx)


def attention_weights(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask = CAUSAL
) -> Float[Array, "B H T S"]:
    """The weight of each value for each query, in float32."""
    return encoding.weights(*attention_logits(encoding, inputs, attention_mask))


def attention_logits(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask = CAUSAL
) -> tuple[Float[Array, "B H T S"], Bool[Array, "T S"]]:
    """The logits, scaled and with the bias, and a mask that is True where a query sees a key."""
    q, k, ctx = inputs.q, _per_query_head(inputs.k, inputs.q), inputs.ctx
    T, S = q.shape[1], k.shape[1]
    mask = attention_mask.materialize(jnp.arange(S - T, S), jnp.arange(S))
    logits = masked(encoding.scores(q, k, ctx), mask)
    bias = bias_of(encoding, q, k, logits, inputs.q_pos, inputs.k_pos, ctx)
    return logits if bias is None else logits + bias, mask


def _per_query_head(x: Float[Array, "B S K e"], q: Float[Array, "B T H d"]) -> Float[Array, "B S H e"]:
    """Keys or values, with each head repeated for its group of query heads."""
    return jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)
