"""Stick-breaking attention, which replaces softmax."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from posenc_jax.encodings.base import Dims, Encoding


class StickBreaking(Encoding):
    r"""Stick-breaking attention: from the nearest key backwards, each key takes a share of what later keys left over.

    .. math:: A_{ij} = \sigma(z_{ij}) \prod_{j<l<i} (1 - \sigma(z_{il})) \;(j < i), \quad A_{ii} = 1 - \sum_{j<i} A_{ij}

    Logits z are those without an encoding. Products are float32 sums of logarithms. The remainder, which is the product
    over all earlier keys, goes to the query's own token, the last key that it may see. Nothing is learned. Source: Tan
    et al. 2024, with the remainder of the authors' code.
    """

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        pass

    def weights(self, logits, mask):
        # The query's own key is the one that is visible and has no visible key after it.
        earlier = mask & jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        z = jnp.where(earlier, logits.astype(jnp.float32), 0)
        left = jnp.where(earlier, jax.nn.log_sigmoid(-z), 0)
        left = lax.cumsum(left, axis=3, reverse=True)  # by this key and all between it and the query
        between = jnp.pad(left[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
        share = jnp.where(earlier, jnp.exp(jax.nn.log_sigmoid(z) + between), 0)
        return jnp.where(mask & ~earlier, jnp.exp(left[..., :1]), share)
