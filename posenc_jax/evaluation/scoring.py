"""The loss of each token of many windows, under given arrays of one model structure."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from posenc_jax.training import sharding
from posenc_jax.training.step import token_losses


class Scorer:
    """Scores windows in batches over all devices; compiled once per window length, whatever the arrays hold.

    Args:
      graphdef: structure of the model.
      mesh: devices that share the windows.
      batch_tokens: about as many tokens are scored at a time, at least a window per device.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, batch_tokens: int):
        self.graphdef, self._mesh, self._batch_tokens = graphdef, mesh, batch_tokens
        self._losses = jax.jit(
            lambda params, constants, *arguments: token_losses(nnx.merge(graphdef, params, constants), *arguments)
        )

    @property
    def compilations(self) -> int:
        return self._losses._cache_size()  # type: ignore[attr-defined]

    def __call__(
        self, params: Any, constants: Any, tokens: Int[np.ndarray, "W N"], positions: Array | None = None
    ) -> Float[np.ndarray, "W N-1"]:
        """Nats for each token of each window after its first, in float64; `positions` are as the model takes them."""
        windows, length = tokens.shape[0], tokens.shape[1] - 1
        devices = self._mesh.size
        rows = devices * max(1, min(self._batch_tokens // length, windows) // devices)
        padded = np.resize(tokens, (-(-windows // rows) * rows, length + 1))  # repeats windows, to fill the last batch
        losses = []
        for start in range(0, len(padded), rows):
            batch = sharding.shard_rows(padded[start : start + rows], self._mesh)
            losses.append(np.asarray(self._losses(params, constants, batch, positions), np.float64))
        return np.concatenate(losses)[:windows]
