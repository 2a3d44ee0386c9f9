"""A watch on attention while a model trains: how large its logits grow, and how many tokens it spreads over."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from posenc_jax.attention.dense import attention_logits
from posenc_jax.models.transformer import Transformer
from posenc_jax.training import sharding

LONGEST = 1024  # tokens of a window that are looked at: all logits of a layer are in memory at once


class AttentionWatch:
    """Reads one window on each device, at contiguous positions; compiled once.

    Args:
      graphdef: structure of the model; of one without attention there is nothing to tell.
      mesh: its devices, as of `sharding.make_mesh`.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh):
        self._graphdef, self._mesh = graphdef, mesh
        self._statistics = jax.jit(lambda params, constants, tokens: statistics(graphdef, params, constants, tokens))

    def __call__(self, params: Any, constants: Any, windows: Int[np.ndarray, "W N"]) -> dict[str, float]:
        """Of each layer `attention_logit_max/layer_I` and `attention_entropy/layer_I`, in nats; NaN where one is."""
        if not isinstance(nnx.merge(self._graphdef, params, constants), Transformer):
            return {}
        rows = math.prod(self._mesh.shape[axis] for axis in sharding.row_axes(self._mesh))
        tokens = np.resize(windows, (rows, windows.shape[1]))[:, :-1][:, :LONGEST]
        with jax.set_mesh(self._mesh):
            found = self._statistics(params, constants, sharding.shard_rows(tokens, self._mesh))
        return {
            f"attention_{name}/layer_{i}": float(value)
            for name, values in zip(("logit_max", "entropy"), np.asarray(found), strict=True)
            for i, value in enumerate(values)
        }


def statistics(
    graphdef: nnx.GraphDef, params: Any, constants: Any, tokens: Int[Array, "B T"]
) -> Float[Array, "2 layers"]:
    """Of each layer, the largest logit that a query has of a key it sees, its bias in it; and the mean, over heads and
    queries, of the entropy of the weights in nats."""
    model, layers = nnx.merge(graphdef, params, constants), []

    def observe(*arguments: Any) -> None:
        logits, weights, mask = attention_logits(*arguments)
        seen = jnp.where(mask, logits, -jnp.inf)
        largest = jnp.where(jnp.isnan(seen).any(), jnp.nan, seen.max())  # XLA's maximum may pass over a NaN
        layers.append(jnp.stack([largest, jax.scipy.special.entr(weights).sum(-1).mean()]))

    model.remat = False  # whose inner traces could not give anything to this one
    for i in range(model.num_layers):
        model.block(i).attention.observer = observe
    model.states(model.embed(tokens))
    return jnp.stack(layers, axis=1)
