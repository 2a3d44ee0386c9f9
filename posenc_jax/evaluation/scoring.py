"""The loss of each token of many windows, under given arrays of one model structure."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.distributed import sharding
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.transformer import Transformer
from posenc_jax.training.objectives import token_losses

LEAST_SHARE = 128  # tokens of a window on each device, below which sharing it does not pay


class Scorer:
    """Scores windows in batches over all devices; compiled once per window length, whatever the arrays hold.

    Devices have windows of their own. But where there are fewer windows than devices, or a window is longer than
    `batch_tokens`, all devices share one window of a transformer at a time, each with its part of the tokens.

    Args:
      graphdef: structure of the model.
      mesh: devices that share the windows, as of `sharding.make_mesh`.
      batch_tokens: about as many tokens are scored at a time, at least a window per device or one shared by all.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, batch_tokens: int):
        self.graphdef, self._mesh, self._batch_tokens = graphdef, mesh, batch_tokens
        self._sequence_mesh = sharding.sequence_mesh(mesh)
        self._losses = jax.jit(
            lambda params, constants, *arguments: token_losses(nnx.merge(graphdef, params, constants), *arguments)
        )

    @property
    def compilations(self) -> int:
        return self._losses._cache_size()  # type: ignore[attr-defined]

    def __call__(
        self,
        params: Any,
        constants: Any,
        tokens: Int[np.ndarray, "W N"],
        positions: Array | None = None,
        hidden: Bool[np.ndarray, "W N-1"] | None = None,
    ) -> Float[np.ndarray, "W N-1"]:
        """Nats as of `token_losses`, in float64; `positions` are as the model takes them."""
        windows, length = tokens.shape[0], tokens.shape[1] - 1
        mesh, rows = self._batches(nnx.merge(self.graphdef, params, constants), windows, length)
        filled = -(-windows // rows) * rows  # repeats windows, to fill the last batch
        padded = np.resize(tokens, (filled, length + 1))
        places = _on_host(positions)
        padded_hidden = None if hidden is None else np.resize(hidden, (filled, length))
        losses = []
        with jax.set_mesh(mesh):
            for start in range(0, len(padded), rows):
                of_batch = slice(start, start + rows)
                batch = sharding.shard_rows(padded[of_batch], mesh)
                own_hidden = None if padded_hidden is None else sharding.shard_rows(padded_hidden[of_batch], mesh)
                losses.append(sharding.fetch(self._losses(params, constants, batch, places, own_hidden)))
        return np.concatenate(losses)[:windows].astype(np.float64)

    def trace(
        self,
        params: Any,
        constants: Any,
        windows: int,
        length: int,
        positions: Array | None = None,
        *,
        masks_tokens: bool = False,
    ) -> None:
        """Trace the program of a call for this many windows, with abstract arrays. jax keeps it for the real call."""
        mesh, rows = self._batches(nnx.merge(self.graphdef, params, constants), windows, length)
        tokens = sharding.abstract_rows((rows, length + 1), mesh)
        hidden = sharding.abstract_rows((rows, length), mesh, dtype=bool) if masks_tokens else None
        with jax.set_mesh(mesh):
            self._losses.eval_shape(params, constants, tokens, _on_host(positions), hidden)

    def _batches(self, model: LanguageModel, windows: int, length: int) -> tuple[Mesh, int]:
        """The devices that share a batch, and its windows."""
        shared = isinstance(model, Transformer) and self._shares(windows, length)
        mesh = self._sequence_mesh if shared else self._mesh
        devices = math.prod(mesh.shape[axis] for axis in sharding.row_axes(mesh))
        return mesh, devices * max(1, min(self._batch_tokens // length, windows) // devices)

    def _shares(self, windows: int, length: int) -> bool:
        """Whether all devices share a window, which they must divide evenly."""
        devices = self._mesh.size
        wanted = windows < devices or length > self._batch_tokens
        return wanted and devices > 1 and length % devices == 0 and length // devices >= LEAST_SHARE


def _on_host(positions: Array | None) -> np.ndarray | None:
    """Positions as an array of the host. The device of an array would be part of the traced program."""
    return None if positions is None else np.asarray(positions)
