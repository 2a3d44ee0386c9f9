"""The largest attention logit and the attention entropy of each layer, measured at each validation.

Training of large models often fails when logits grow until attention falls on few keys (entropy collapse: Zhai et al.
2023). The loss shows this late.
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.scipy.special import entr
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.attention.by_query import by_query
from posenc_jax.attention.dense import attention_logits, weights_of
from posenc_jax.attention.dispatch import fastest, on_rows
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Encoding
from posenc_jax.evaluation.scoring import evaluation_positions
from posenc_jax.models.transformer import Transformer
from posenc_jax.training import objectives

WINDOWS = 4  # the most validation windows that are read
MEASURES = "attention_logit_max", "attention_entropy"

log = logging.getLogger(__name__)


class AttentionStats:
    """Reads a few windows, one per device at a time. Compiles once per window length, for all values of the arrays."""

    def __init__(self, graphdef: nnx.GraphDef, mesh: Mesh):
        self.graphdef, self._mesh = graphdef, mesh
        self._layers = jax.jit(
            lambda params, constants, *arguments: layers(nnx.merge(graphdef, params, constants), *arguments)
        )

    def __call__(
        self,
        config: RunConfig,
        params: Any,
        constants: Any,
        windows: Int[np.ndarray, "W N"],
        positions: Int[np.ndarray, "W N-1"] | None = None,
    ) -> dict[str, list[float]]:
        """The largest logit of each layer and the mean entropy of its weights, in nats. Empty without attention.

        The positions are those of a validation, if windows have none of their own. So are the hidden tokens of an
        encoder. A non-finite value is logged and returned unchanged.
        """
        if not isinstance(nnx.merge(self.graphdef, params, constants), Transformer):
            return {}
        hidden = objectives.evaluation_choice(config, windows) if config.masks_tokens else None
        devices = self._devices()
        own = np.arange(0, len(windows), math.ceil(len(windows) / WINDOWS))
        own = np.resize(own, -(-len(own) // devices) * devices)  # repeats windows: devices need equally many
        places, found = evaluation_positions(config, windows.shape[1] - 1), []
        with jax.set_mesh(self._mesh):
            for rows in own.reshape(-1, devices):
                batch, chosen = (
                    None if x is None else sharding.shard_rows(x[rows], self._mesh) for x in (windows, hidden)
                )
                own_places = places if positions is None else positions[rows]
                found.append(sharding.fetch(self._layers(params, constants, batch, own_places, chosen)))
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
                own = np.zeros((self._devices(), length), np.int32)  # in place of those of samples
                places = own if config.positions.of_task else evaluation_positions(config, length)
                self._layers.eval_shape(params, constants, batch, places, chosen)  # type: ignore[attr-defined]

    def _devices(self) -> int:
        """The number of devices that hold different rows."""
        return math.prod(self._mesh.shape[axis] for axis in sharding.row_axes(self._mesh))


def layers(
    model: Transformer,
    tokens: Int[Array, "B N"],
    places: Array | None = None,
    hidden: Bool[Array, "B N-1"] | None = None,
) -> Float[Array, "layers B 2"]:
    """The largest logit and the mean entropy (nats) of each layer and window.

    Changes the model, which must not be used afterwards. The arguments are those of `token_losses`. The largest logit
    is over all heads and all pairs of a query and a key that it sees. The mean entropy is over queries and heads. The
    outputs of the layers do not change. Memory is linear in the length.
    """
    found, in_blocks = [], functools.partial(by_query, function=logit_max_and_entropy)

    def attend(*arguments):
        inputs = arguments[1]
        of_row = (on_rows(in_blocks, len(inputs.q)) or in_blocks)(*arguments)
        found.append(jnp.stack([largest(of_row[..., 0], (1, 2)), of_row[..., 1].mean(axis=(1, 2))], axis=-1))
        return fastest(*arguments)(*arguments)

    model.remat = False  # jax.checkpoint would not let the found values out of a layer
    for layer in range(model.num_layers):
        model.block(layer).attention.attend = attend
    objectives.token_losses(model, tokens, places, hidden)
    return jnp.stack(found)


def logit_max_and_entropy(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask
) -> Float[Array, "B T H 2"]:
    r"""For each query and head: \max_j z_{ij} over the keys that it sees, and -\sum_j A_{ij} \ln A_{ij} in nats.

    The encoding computes the weights A from the logits z, not always by a softmax. The entropy has no term for the rest
    if the weights sum to less than 1.
    """
    logits, mask = attention_logits(encoding, inputs, attention_mask)
    entropy = entr(weights_of(encoding, logits, mask, inputs.sinks)).sum(axis=-1)
    return jnp.stack([largest(jnp.where(mask, logits, -jnp.inf), -1), entropy], axis=-1).swapaxes(1, 2)


def largest(x: Float[Array, "*n"], axis: int | tuple[int, ...]) -> Float[Array, "*m"]:
    """The maximum, or NaN if any value is NaN. XLA on CPU may ignore NaN in a maximum."""
    return jnp.where(jnp.isnan(x).any(axis=axis), jnp.nan, x.max(axis=axis))
