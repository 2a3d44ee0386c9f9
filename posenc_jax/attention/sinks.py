r"""Attention sinks: a learned logit per head, without a key or value, that takes weight from all keys.

.. math:: A_{ij} = \frac{e^{z_{ij}}}{e^{s_h} + \sum_k e^{z_{ik}}}
    = \sigma(L_i - s_h) \operatorname{softmax}_j z_{ij}, \quad L_i = \ln \sum_k e^{z_{ik}}

Source: gpt-oss (OpenAI 2025). With :math:`s_h = 0` this is the softmax of Miller 2023, "Attention is off by one".
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def kept(log_normalizer: Float[Array, "B H T"], sinks: Float[Array, "H"]) -> Float[Array, "B H T"]:
    """The share of its weight that a query gives to keys. `log_normalizer` is L of each query."""
    return jax.nn.sigmoid(log_normalizer - sinks[:, None])


def with_sinks(
    out: Float[Array, "B T H e"], log_normalizer: Float[Array, "B H T"], sinks: Float[Array, "H"] | None
) -> Float[Array, "B T H e"]:
    """The output of attention with sinks, from that without. Sinks of None change nothing."""
    if sinks is None:
        return out
    share = jnp.moveaxis(kept(log_normalizer, sinks), 1, 2)[..., None]
    return (out * share).astype(out.dtype)
