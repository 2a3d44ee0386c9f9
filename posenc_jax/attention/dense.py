"""Attention with all logits [B, H, T, S] in memory: every hook of an encoding works here."""

import math

import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Float

from posenc_jax.attention.sinks import kept
from posenc_jax.documents import within_documents
from posenc_jax.encodings.base import (
    CAUSAL,
    AttentionInputs,
    AttentionMask,
    Encoding,
    Keys,
    Logits,
    Mask,
    Queries,
    bias_of,
    masked,
    overrides,
    soft_capped,
)


def dense(
    encoding: Encoding,
    inputs: AttentionInputs,
    attention_mask: AttentionMask = CAUSAL,
    *,
    updated_keys: bool = False,
) -> Float[Array, "B T H e"]:
    """Attention of the last T of S tokens to the keys that `attention_mask` lets them see, in the dtype of `v`.

    If `updated_keys`, the keys have been through `Encoding.update_keys`, and `Encoding.scores` is not called.
    """
    q, _, v, q_pos, k_pos, ctx, sinks, _ = inputs
    logits, mask = attention_logits(encoding, inputs, attention_mask, updated_keys=updated_keys)
    weights = weights_of(encoding, logits, mask, sinks).astype(v.dtype)
    if overrides(encoding, "values"):
        return encoding.values(weights, _per_query_head(v, q), q_pos, k_pos, ctx)
    (B, T, H, _), (S, K) = q.shape, v.shape[1:3]
    return jnp.einsum("bkgts,bske->btkge", weights.reshape(B, K, H // K, T, S), v).reshape(B, T, H, -1)


def attention_weights(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask = CAUSAL
) -> Float[Array, "B H T S"]:
    """The weight of each value for each query, in float32."""
    return weights_of(encoding, *attention_logits(encoding, inputs, attention_mask), inputs.sinks)


def weights_of(
    encoding: Encoding, logits: Logits, mask: Mask, sinks: Float[Array, "H"] | None
) -> Float[Array, "B H T S"]:
    """The weights that the encoding computes from logits. What the sinks take is missing from their sum."""
    weights = encoding.weights(logits, mask)
    if sinks is None:
        return weights
    return weights * kept(logsumexp(masked(logits, mask), axis=-1), sinks)[..., None]


def attention_logits(
    encoding: Encoding,
    inputs: AttentionInputs,
    attention_mask: AttentionMask = CAUSAL,
    *,
    updated_keys: bool = False,
) -> tuple[Float[Array, "B H T S"], Mask]:
    """The logits, scaled and with the bias, and a mask that is True where a query sees a key."""
    q, k, ctx = inputs.q, _per_query_head(inputs.k, inputs.q), inputs.ctx
    T, S = q.shape[1], k.shape[1]
    mask = within_documents(attention_mask.materialize(jnp.arange(S - T, S), jnp.arange(S)), inputs.documents)
    own = overrides(type(encoding), "scores") and not updated_keys
    logits = masked(encoding.scores(q, k, ctx) if own else _scores(q, inputs.k, encoding.softcap), mask)
    bias = bias_of(encoding, q, k, logits, inputs.q_pos, inputs.k_pos, ctx)
    return logits if bias is None else logits + bias, mask


def _scores(q: Queries, k: Keys, softcap: float) -> Logits:
    """What `Encoding.scores` computes, without a copy of the keys for each query head."""
    (B, T, H, d), (S, K) = q.shape, k.shape[1:3]
    grouped = q.reshape(B, T, K, H // K, d)
    products = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32)
    return soft_capped(products.reshape(B, H, T, S) / math.sqrt(d), softcap)


def _per_query_head(x: Float[Array, "B S K e"], q: Float[Array, "B T H d"]) -> Float[Array, "B S H e"]:
    """Keys or values, with each head repeated for its group of query heads."""
    return jnp.repeat(x, q.shape[2] // x.shape[2], axis=2)
