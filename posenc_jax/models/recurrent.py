"""Recurrent language models, which read tokens in order and need no encoding: vanilla RNN, LSTM, GRU and ELMo."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.config import ModelConfig
from posenc_jax.documents import first_tokens
from posenc_jax.models.language_model import LanguageModel, Positions, dropout


@jax.tree_util.register_dataclass
@dataclass
class CellCache:
    """What one recurrent layer keeps of the tokens that it has read: the carry of its cell; None before the first."""

    carry: Any = None

    def grown(self, capacity: int) -> "CellCache":
        return self


class LayerStack(nnx.Module):
    r"""Recurrent layers, each reading the hidden states of the one below.

    .. math:: h_t^l = \mathrm{cell}^l(h_{t-1}^l, h_t^{l-1}), \quad h_0^l = 0

    The cells are flax's: `rnn` (Elman 1990), `lstm` (Hochreiter and Schmidhuber 1997, with the forget gates of Gers et
    al. 2000, whose bias starts at 1 as in Jozefowicz et al. 2015) and `gru` (Cho et al. 2014). Recurrent kernels start
    orthogonal, gate by gate. Dropout acts between layers, not between time steps (Zaremba et al. 2014).
    """

    def __init__(self, config: ModelConfig, cell: str, rngs: nnx.Rngs):
        self.num_layers, self.dropout, self.remat = config.num_layers, config.dropout, config.remat
        for i in range(config.num_layers):
            setattr(self, f"cell_{i}", _cell(cell, config, rngs))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        keys: list[Array | None],
        cache: list[CellCache] | None = None,
        starts: Bool[Array, "B T"] | None = None,
    ) -> list[Float[Array, "B T D"]]:
        """The inputs and the states of every layer; `keys` has a dropout key per layer.

        `starts` is True where a document starts, if a window holds several. The state there is that before any token.
        """
        layers = [x]
        for i in range(self.num_layers):
            run = jax.checkpoint(self._run, static_argnums=0) if self.remat else self._run
            read = dropout(layers[-1], self.dropout, keys[i])
            carry, states = run(i, read, cache[i].carry if cache else None, starts)
            if cache:
                cache[i].carry = carry
            layers.append(states)
        return layers

    def _run(
        self, i: int, x: Float[Array, "B T D"], start: Any, starts: Bool[Array, "B T"] | None
    ) -> tuple[Any, Float[Array, "B T D"]]:
        cell = getattr(self, f"cell_{i}")
        if start is None:
            zero = jnp.zeros((x.shape[0], cell.hidden_features), x.dtype)
            start = (zero, zero) if isinstance(cell, nnx.OptimizedLSTMCell) else zero

        def restart(carry, token):
            x, starts = token
            return cell(jax.tree.map(lambda state: jnp.where(starts[:, None], 0, state), carry), x)

        if starts is None:
            carry, states = jax.lax.scan(cell, start, x.swapaxes(0, 1))
        else:
            carry, states = jax.lax.scan(restart, start, (x.swapaxes(0, 1), starts.T))
        return carry, states.swapaxes(0, 1)


class Recurrent(LanguageModel):
    """A `LayerStack` of rnn, lstm or gru layers between embeddings and a softmax. The cell is `config.architecture`."""

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size=vocab_size, rngs=rngs)
        self.stack = LayerStack(config, config.architecture, rngs)

    def new_cache(self, capacity: int) -> list[CellCache]:
        return [CellCache() for _ in range(self.num_layers)]

    def states(
        self,
        x: Float[Array, "B T D"],
        positions: Positions = None,
        *,
        documents: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
        cache: list[CellCache] | None = None,
    ) -> Float[Array, "B T D"]:
        *keys, last = self.dropout_keys(dropout_key, self.num_layers + 1)
        return dropout(self.stack(x, keys, cache, _starts(documents))[-1], self.dropout, last)


class ELMo(LanguageModel):
    r"""Two LSTM language models, one reading forwards and one backwards, and a learned mixture of their layers.

    .. math:: h_t = \gamma \sum_{l=0}^{L} \mathrm{softmax}(s)_l\, h_t^l, \quad h_t^0 = \sqrt{D}\, E[x_t]

    for each direction; the representation of a token is the concatenation of both mixtures. Both directions share the
    embeddings E, the output layer, s (initially 0) and gamma (initially 1). The module called as a language model is
    the forward direction, so that its loss can be compared with that of other models. Training minimises the mean loss
    of the two directions.

    Source: Peters et al. 2018, sections 3.1 and 3.2. Differs from the reference: there is no convolution over
    characters; layers have no projection and no residual connection; and the mixture is learned with the language
    model. In the reference the language model reads its top layer, and each task learns a mixture.
    """

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size=vocab_size, rngs=rngs)
        self.forwards = LayerStack(config, "lstm", rngs)
        self.backwards = LayerStack(config, "lstm", rngs)
        self.mixture = nnx.Param(jnp.zeros(config.num_layers + 1, jnp.float32))
        self.scale = nnx.Param(jnp.ones((), jnp.float32))

    def new_cache(self, capacity: int) -> list[CellCache]:
        return [CellCache() for _ in range(self.num_layers)]

    def states(
        self,
        x: Float[Array, "B T D"],
        positions: Positions = None,
        *,
        documents: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
        cache: list[CellCache] | None = None,
    ) -> Float[Array, "B T D"]:
        *keys, last = self.dropout_keys(dropout_key, self.num_layers + 1)
        return dropout(self._mixed(self.forwards(x, keys, cache, _starts(documents))), self.dropout, last)

    def backward_states(
        self,
        x: Float[Array, "B T D"],
        *,
        documents: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T D"]:
        """The states after reading each token and all that follow it in its document, the last token first."""
        *keys, last = self.dropout_keys(dropout_key, self.num_layers + 1)
        starts = None if documents is None else first_tokens(documents[:, ::-1])
        return dropout(self._mixed(self.backwards(x[:, ::-1], keys, starts=starts))[:, ::-1], self.dropout, last)

    def backward_logits(self, tokens: Int[Array, "B T"], *, dropout_key: Array | None = None) -> Float[Array, "B T V"]:
        """Logits of the token before each one, in float32."""
        return self.unembed(self.backward_states(self.embed(tokens), dropout_key=dropout_key))

    def representations(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T both"]:
        """Contextual representations [B, T, 2 D]: forward states, then backward states."""
        x = self.embed(tokens)
        return jnp.concatenate([self.states(x), self.backward_states(x)], axis=-1)

    def _mixed(self, layers: list[Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
        shares = self.scale[...] * jax.nn.softmax(self.mixture[...])
        return jnp.einsum("l,lbtd->btd", shares, jnp.stack(layers)).astype(self.dtype)


def _starts(documents: Int[Array, "B T"] | None) -> Bool[Array, "B T"] | None:
    return None if documents is None else first_tokens(documents)


def _cell(name: str, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    D, options = config.d_model, {"dtype": jnp.dtype(config.dtype), "keep_rngs": False, "rngs": rngs}
    if name == "rnn":
        return nnx.SimpleCell(D, D, **options)
    options["recurrent_kernel_init"] = _orthogonal_gates
    if name == "gru":
        return nnx.GRUCell(D, D, **options)
    return nnx.OptimizedLSTMCell(D, D, bias_init=_open_forget_gate, **options)


def _orthogonal_gates(key: Array, shape: tuple[int, int], dtype: DTypeLike) -> Float[Array, "D N"]:
    """One orthogonal matrix per gate. If the whole kernel were orthogonal, each gate would shrink the state."""
    D, width = shape
    orthogonal = nnx.initializers.orthogonal()
    return jnp.concatenate([orthogonal(own, (D, D), dtype) for own in jax.random.split(key, width // D)], axis=1)


def _open_forget_gate(key: Array, shape: tuple[int], dtype: DTypeLike) -> Float[Array, "N"]:
    """Biases of the input, forget, cell and output gates: 1 for the forget gate, so that the cell keeps its state."""
    return jnp.repeat(jnp.array([0, 1, 0, 0], dtype), shape[0] // 4)
