"""What attention's softmax is given in each layer, and how sharp it comes out: read now and then, beside the losses.

Training of large models often breaks where logits grow until few weights are left (entropy collapse: Zhai et al. 2023),
which the loss shows late.
"""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import entr
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Real

from posenc_jax import positions
from posenc_jax.attention.by_query import of_rows
from posenc_jax.attention.dense import attention_logits
from posenc_jax.attention.dispatch import fastest
from posenc_jax.attention.rows import on_rows
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.encodings.base import AttentionMask, Context, Encoding
from posenc_jax.models.transformer import Transformer
from posenc_jax.training import objectives

WINDOWS = 4  # that are read, of those of a validation
MEASURES = "attention_logit_max", "attention_entropy"

log = logging.getLogger(__name__)


class AttentionStats:
    """Reads a few windows, one at a time on each device; compiled once per window length, whatever the arrays hold."""

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh):
        self.graphdef, self._mesh = graphdef, mesh
        self._layers = jax.jit(
            lambda params, constants, *arguments: layers(nnx.merge(graphdef, params, constants), *arguments)
        )

    def __call__(
        self, config: RunConfig, params: Any, constants: Any, windows: Int[np.ndarray, "W N"]
    ) -> dict[str, list[float]]:
        """The largest logit of each layer, and the mean entropy of its weights in nats; nothing without attention.

        Windows are read as a validation does: at its positions and, by an encoder, with the same tokens hidden. A value
        that is not finite is told, and given as it is.
        """
        if not isinstance(nnx.merge(self.graphdef, params, constants), Transformer):
            return {}
        hidden = objectives.evaluation_choice(config, windows) if config.masks_tokens else None
        devices = self._devices()
        own = np.arange(0, len(windows), math.ceil(len(windows) / WINDOWS))
        own = np.resize(own, -(-len(own) // devices) * devices)  # repeats windows, so that every device has as many
        places, found = _places(config, windows.shape[1] - 1), []
        with jax.set_mesh(self._mesh):
            for rows in own.reshape(-1, devices):
                batch, chosen = (
                    None if x is None else sharding.shard_rows(x[rows], self._mesh) for x in (windows, hidden)
                )
                found.append(sharding.fetch(self._layers(params, constants, batch, places, chosen)))
        of_window = np.concatenate(found, axis=1).astype(np.float64)
        values = dict(zip(MEASURES, (of_window[..., 0].max(axis=1), of_window[..., 1].mean(axis=1)), strict=True))
        for name, of_layer in values.items():
            for layer in np.flatnonzero(~np.isfinite(of_layer)):
                log.warning("%s of layer %d is %s", name, layer, of_layer[layer])
        return {name: of_layer.tolist() for name, of_layer in values.items()}

    def trace(self, config: RunConfig, params: Any, constants: Any, length: int) -> None:
        """Trace the program of a call for windows of `length` tokens, with abstract arrays."""
        if isinstance(nnx.merge(self.graphdef, params, constants), Transformer):
            batch = sharding.abstract_rows((self._devices(), length + 1), self._mesh)
            hidden = sharding.abstract_rows((self._devices(), length), self._mesh, dtype=bool)
            chosen = hidden if config.masks_tokens else None
            with jax.set_mesh(self._mesh):
                self._layers.eval_shape(params, constants, batch, _places(config, length), chosen)  # type: ignore[attr-defined]

    def _devices(self) -> int:
        """The number of devices that hold different rows."""
        return math.prod(self._mesh.shape[axis] for axis in sharding.row_axes(self._mesh))


def _places(config: RunConfig, length: int) -> Array | None:
    return positions.in_evaluation(config.positions, length, config.model.num_layers, config.training.length)


def layers(
    model: Transformer,
    tokens: Int[Array, "B N"],
    places: Array | None = None,
    hidden: Bool[Array, "B N-1"] | None = None,
) -> Float[Array, "layers B 2"]:
    """The largest logit and the mean entropy (nats) of each layer and window, of a model that is used for nothing else.

    The arguments are those of `token_losses`. The largest is over pairs of a query and a key that it sees, in all
    heads; the mean over queries and heads. The model's outputs are made as ever, and memory is linear in the length.
    """
    found = []

    def attend(encoding, q, k, v, q_pos, k_pos, ctx, attention_mask):
        arguments = encoding, q, k, v, q_pos, k_pos, ctx, attention_mask
        of_row = (on_rows(_in_blocks, len(q)) or _in_blocks)(*arguments)
        found.append(jnp.stack([largest(of_row[..., 0], (1, 2)), of_row[..., 1].mean(axis=(1, 2))], axis=-1))
        return fastest(encoding, q, k, v, attention_mask)(*arguments)

    model.remat = False  # what is found would stay inside a layer that is to be computed again
    for layer in range(model.num_layers):
        model.block(layer).attention.attend = attend
    objectives.token_losses(model, tokens, places, hidden)
    return jnp.stack(found)


def _in_blocks(*arguments: Any) -> Float[Array, "B T H 2"]:
    return of_rows(logit_max_and_entropy, *arguments)


def logit_max_and_entropy(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    q_pos: Real[Array, "#B T"],
    k_pos: Real[Array, "#B S"],
    ctx: Context,
    attention_mask: AttentionMask,
) -> Float[Array, "B T H 2"]:
    r"""Of each query, in each head, \max_j z_{ij} over keys that it sees, and -\sum_j A_{ij} \ln A_{ij} in nats.

    A are the weights that the encoding makes of logits z, which need be no softmax. A share that they leave over, so
    that they sum to less than 1, is in no term.
    """
    logits, mask = attention_logits(encoding, q, k, q_pos, k_pos, ctx, attention_mask)
    entropy = entr(encoding.weights(logits, mask)).sum(axis=-1)
    return jnp.stack([largest(jnp.where(mask, logits, -jnp.inf), -1), entropy], axis=-1).swapaxes(1, 2)


def largest(x: Float[Array, "*n"], axis: int | tuple[int, ...]) -> Float[Array, "*m"]:
    """The maximum, NaN where any is: XLA on CPU may leave NaN out of it."""
    return jnp.where(jnp.isnan(x).any(axis=axis), jnp.nan, x.max(axis=axis))
