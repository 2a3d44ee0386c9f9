"""The loss of each token of many windows, for a model structure and given arrays."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.transformer import Transformer
from posenc_jax.positions import in_evaluation
from posenc_jax.training.objectives import last_predictions, token_losses

MIN_SHARE = 128  # tokens per device; sharing a window among devices is not worth it with fewer


class Scorer:
    """Scores windows in batches over all devices. Compiles once per window length, for all values of the arrays.

    Each device scores its own windows. But all devices share one window of a transformer at a time, each with its part
    of the tokens, if there are fewer windows than devices or a window is longer than `batch_tokens`. The parts must be
    equal, with at least MIN_SHARE tokens.

    Args:
      graphdef: structure of the model.
      mesh: devices that share the windows, see `sharding.make_mesh`.
      batch_tokens: approximate tokens per batch. A batch has at least one window per device, or one shared window.
    """

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh, batch_tokens: int):
        self.graphdef, self._mesh, self._batch_tokens = graphdef, mesh, batch_tokens
        self._sequence_mesh = sharding.sequence_mesh(mesh)
        self._others: dict[nnx.GraphDef, Scorer] = {}
        self._losses = jax.jit(
            lambda params, constants, *arguments: token_losses(nnx.merge(graphdef, params, constants), *arguments),
            compiler_options=sharding.forward_options(),
        )
        self._predictions = jax.jit(
            lambda params, constants, *arguments, last: last_predictions(
                nnx.merge(graphdef, params, constants), *arguments, last=last
            ),
            static_argnames="last",
            compiler_options=sharding.forward_options(),
        )

    def of(self, graphdef: nnx.GraphDef, name: str) -> "Scorer":
        """The scorer of another structure, which the name identifies. Its compiled programs are kept."""
        if graphdef not in self._others:
            self._others[graphdef] = Scorer(graphdef, self._mesh, self._batch_tokens)
        return self._others[graphdef]

    @property
    def compilations(self) -> int:
        return self._losses._cache_size()  # type: ignore[attr-defined]

    def __call__(
        self,
        params: Any,
        constants: Any,
        tokens: Int[np.ndarray, "W N"],
        positions: Array | np.ndarray | None = None,
        hidden: Bool[np.ndarray, "W N-1"] | None = None,
    ) -> Float[np.ndarray, "W N-1"]:
        """The losses of `token_losses` in nats, in float64. `positions` has the form that the model takes."""
        (losses,) = self._run(params, constants, tokens, positions, hidden)
        return losses.astype(np.float64)

    def predictions(
        self,
        params: Any,
        constants: Any,
        tokens: Int[np.ndarray, "W N"],
        positions: Array | np.ndarray | None = None,
        hidden: Bool[np.ndarray, "W N-1"] | None = None,
        *,
        last: int,
    ) -> tuple[Float[np.ndarray, "W last"], Int[np.ndarray, "W last"]]:
        """The losses in nats of the last tokens of each window, and the most likely tokens at their places.

        Those of `last_predictions`.
        """
        nats, tokens = self._run(params, constants, tokens, positions, hidden, last=last)
        return nats.astype(np.float64), tokens

    def _run(
        self, params: Any, constants: Any, tokens: Any, positions: Any, hidden: Any = None, *, last: int | None = None
    ) -> list[np.ndarray]:
        """The outputs of `score_batch` for all windows."""
        windows, length = tokens.shape[0], tokens.shape[1] - 1
        mesh, rows = self._batches(nnx.merge(self.graphdef, params, constants), windows, length)
        filled = -(-windows // rows) * rows  # repeats windows to fill the last batch
        padded, places = np.resize(tokens, (filled, length + 1)), _on_host(positions)
        masks = [] if hidden is None else [np.resize(hidden, (filled, length))]
        found = []
        with jax.set_mesh(mesh):
            for start in range(0, filled, rows):
                batch, *mask = (own[start : start + rows] for own in [padded, *masks])
                own = _of_windows(places, start, start + rows)
                found.append(self.score_batch(mesh, params, constants, batch, own, *mask, last=last))
        return [np.concatenate(batches)[:windows] for batches in zip(*found, strict=True)]

    def score_batch(
        self,
        mesh: Mesh,
        params: Any,
        constants: Any,
        tokens: Int[np.ndarray, "B N"],
        positions: np.ndarray | None,
        hidden: Bool[np.ndarray, "B N-1"] | None = None,
        *,
        last: int | None = None,
    ) -> list[np.ndarray]:
        """The losses of one batch or, given `last`, its last losses and most likely tokens. `mesh` is in use."""
        batch, *mask = (sharding.shard_rows(x, mesh) for x in (tokens, hidden) if x is not None)
        if last is None:
            return [sharding.fetch(self._losses(params, constants, batch, positions, *mask))]
        return [sharding.fetch(x) for x in self._predictions(params, constants, batch, positions, *mask, last=last)]

    def trace(
        self,
        params: Any,
        constants: Any,
        windows: int,
        length: int,
        positions: Array | np.ndarray | None = None,
        *,
        masks_tokens: bool = False,
        last: int | None = None,
    ) -> None:
        """Trace the program for this many windows, with abstract arrays. JAX caches it for the real call.

        It computes losses or, given `last`, predictions.
        """
        mesh, rows = self._batches(nnx.merge(self.graphdef, params, constants), windows, length)
        tokens = sharding.abstract_rows((rows, length + 1), mesh)
        hidden = [sharding.abstract_rows((rows, length), mesh, dtype=bool)] if masks_tokens else []
        arguments = params, constants, tokens, _of_windows(_on_host(positions), 0, rows), *hidden
        with jax.set_mesh(mesh):
            if last is not None:
                self._predictions.eval_shape(*arguments, last=last)
            else:
                self._losses.eval_shape(*arguments)

    def _batches(self, model: LanguageModel, windows: int, length: int) -> tuple[Mesh, int]:
        """The mesh for a batch, and the number of windows in it."""
        count = self._mesh.size
        wanted = count > 1 and (windows < count or length > self._batch_tokens)
        divisible = length % count == 0 and length // count >= MIN_SHARE
        shared = wanted and divisible and isinstance(model, Transformer)
        mesh = self._sequence_mesh if shared else self._mesh
        devices = math.prod(mesh.shape[axis] for axis in sharding.row_axes(mesh))
        return mesh, devices * max(1, min(self._batch_tokens // length, windows) // devices)


class ScoredModel(NamedTuple):
    """A model that is scored: the settings of its run, a scorer of its structure, and its arrays, possibly abstract."""

    config: RunConfig
    scorer: Scorer
    params: Any
    constants: Any


def evaluation_positions(config: RunConfig, length: int) -> Array | None:
    """The positions of the tokens of a window in evaluation, in the form that the model takes."""
    return in_evaluation(config.positions, length, config.model.num_layers, config.training.length)


def _of_windows(places: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
    """The positions of windows `start` to `stop`, counted from the first again after the last.

    Unchanged if they are those of all windows.
    """
    if places is None or places.ndim != 2 or len(places) == 1:
        return places
    return places.take(range(start, stop), axis=0, mode="wrap")


def _on_host(positions: Array | np.ndarray | None) -> np.ndarray | None:
    """Positions as a NumPy array. The device of a JAX array would be part of the traced program."""
    return None if positions is None else np.asarray(positions)
