"""A short depthwise convolution over tokens, from which some encodings compute their contexts."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def causal_convolution(x: Float[Array, "B T C"], taps: Float[Array, "n C"]) -> Float[Array, "B T C"]:
    """Each channel's weighted sum over the last n tokens. The last tap weighs the current token."""
    padded = jnp.pad(x, [(0, 0), (len(taps) - 1, 0), (0, 0)])
    shifted = jnp.stack([padded[:, i : i + x.shape[1]] for i in range(len(taps))])
    return jnp.einsum("nbtc,nc->btc", shifted, taps)
