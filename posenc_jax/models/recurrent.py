"""Language models from before attention: stacked vanilla, LSTM or GRU layers, which know order by reading in order."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Real

from posenc_jax.config import ModelConfig
from posenc_jax.matmul import Linear, matmul
from posenc_jax.models.transformer import dropout


class Recurrent(nnx.Module):
    r"""Stacked recurrent layers, each reading the hidden states of the one below, and a softmax over the vocabulary.

    .. math:: h_t^l = \mathrm{cell}^l(h_{t-1}^l, h_t^{l-1}), \quad h_t^0 = E[x_t], \quad h_0^l = 0

    `rnn` is Elman 1990, `lstm` Hochreiter and Schmidhuber 1997 with forget gates (Gers et al. 2000), whose bias starts
    at 1 (Jozefowicz et al. 2015), `gru` Cho et al. 2014; the cells are flax's. Recurrent kernels start orthogonal, gate
    by gate. Dropout is on what is read from a layer below, not from a step before (Zaremba et al. 2014).

    Args:
      config: widths and options; activations have `config.dtype`, parameters and logits are float32.
      vocab_size: tokens V.
    """

    table_length: ClassVar[None] = None  # it can read any position

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs):
        D, self.dtype = config.d_model, jnp.dtype(config.dtype)
        self.num_layers, self.dropout, self.remat = config.num_layers, config.dropout, config.remat
        embedding = jax.random.normal(rngs.params(), (vocab_size, D), jnp.float32) / math.sqrt(D)
        self.embedding = nnx.Param(embedding)
        for i in range(config.num_layers):
            setattr(self, f"cell_{i}", _cell(config, rngs))
        self.tied_embeddings = config.tied_embeddings
        if not config.tied_embeddings:
            self.unembedding = Linear(D, vocab_size, dtype=self.dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Real[Array, "..."] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each one, in float32; with dropout if there is a key for it.

        `positions`, which every language model is called with, are not looked at: tokens are read in their order.
        """
        keys = [None] * (self.num_layers + 1)
        if dropout_key is not None and self.dropout:
            keys = list(jax.random.split(dropout_key, self.num_layers + 1))
        # As in the transformer, tied embeddings enter at standard deviation 1.
        x = (self.embedding[...][tokens] * math.sqrt(self.embedding.shape[1])).astype(self.dtype)
        for i in range(self.num_layers):
            run = jax.checkpoint(self._run_layer, static_argnums=0) if self.remat else self._run_layer
            x = run(i, dropout(x, self.dropout, keys[i]))
        x = dropout(x, self.dropout, keys[-1]).reshape(-1, x.shape[-1])
        if self.tied_embeddings:
            logits = matmul(x, self.embedding[...].astype(x.dtype), True, jnp.float32)
        else:
            logits = self.unembedding(x).astype(jnp.float32)
        return logits.reshape(*tokens.shape, -1)

    def _run_layer(self, i: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        cell = getattr(self, f"cell_{i}")
        zero = jnp.zeros((x.shape[0], cell.hidden_features), x.dtype)
        start: Any = (zero, zero) if isinstance(cell, nnx.OptimizedLSTMCell) else zero
        _, states = jax.lax.scan(cell, start, x.swapaxes(0, 1))
        return states.swapaxes(0, 1)


def _cell(config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    D, options = config.d_model, {"dtype": jnp.dtype(config.dtype), "keep_rngs": False, "rngs": rngs}
    if config.architecture == "rnn":
        return nnx.SimpleCell(D, D, **options)
    options["recurrent_kernel_init"] = _orthogonal_gates
    if config.architecture == "gru":
        return nnx.GRUCell(D, D, **options)
    return nnx.OptimizedLSTMCell(D, D, bias_init=_open_forget_gate, **options)


def _orthogonal_gates(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "D N"]:
    """An orthogonal matrix for each gate; orthogonal as a whole, the kernel would shrink the state in each of them."""
    D, width = shape
    orthogonal = nnx.initializers.orthogonal()
    return jnp.concatenate([orthogonal(own, (D, D), dtype) for own in jax.random.split(key, width // D)], axis=1)


def _open_forget_gate(key: Array, shape: tuple[int], dtype: DTypeLike) -> Float[Array, "N"]:
    """Biases of the input, forget, cell and output gates: 1 for forget, so that the cell keeps what it holds."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)
