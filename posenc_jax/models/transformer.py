"""The decoder-only transformer that takes any positional encoding."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax import encodings
from posenc_jax.attention import Attention
from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import EncodingConfig, TemperatureConfig, TransformerConfig
from posenc_jax.encodings.base import Dims, Encoding
from posenc_jax.matmul import Linear, matmul


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020) or GELU block, on tokens flattened to one axis."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, out_stddev: float):
        dtype = jnp.dtype(config.dtype)
        self.gated = config.activation == "swiglu"
        width = config.d_ff * (2 if self.gated else 1)
        out_init = nnx.initializers.variance_scaling(out_stddev**2, "fan_in", "normal")
        self.up = Linear(config.d_model, width, dtype=dtype, rngs=rngs)
        self.down = Linear(config.d_ff, config.d_model, dtype=dtype, kernel_init=out_init, rngs=rngs)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        hidden = self.up(x)
        if self.gated:
            gate, hidden = jnp.split(hidden, 2, axis=-1)
            hidden = jax.nn.silu(gate) * hidden
        else:
            hidden = jax.nn.gelu(hidden)
        return self.down(hidden)


class Block(nnx.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: TransformerConfig, temperature: Temperature | None, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        out_stddev = 1 / math.sqrt(2 * config.num_layers)  # the residual stream sums 2 num_layers branches
        self.dropout = config.dropout
        self.attention_norm = nnx.RMSNorm(config.d_model, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs, temperature=temperature, out_stddev=out_stddev)
        self.feed_forward_norm = nnx.RMSNorm(config.d_model, dtype=dtype, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs, out_stddev)

    def __call__(
        self,
        encoding: Encoding,
        x: Float[Array, "B T D"],
        positions: Real[Array, "#B T"],
        window: int | None,
        key: Array | None,
    ) -> Float[Array, "B T D"]:
        keys = (None, None) if key is None else jax.random.split(key)
        attended = self.attention(encoding, self.attention_norm(x), positions, window)
        x = x + dropout(attended, self.dropout, keys[0])
        tokens = self.feed_forward_norm(x).reshape(-1, x.shape[-1])
        return x + dropout(self.feed_forward(tokens).reshape(x.shape), self.dropout, keys[1])


class Transformer(nnx.Module):
    """Decoder-only language model: pre-norm RMSNorm, causal attention, one positional encoding of any kind.

    Args:
      config: widths and options; activations have `config.dtype`, parameters, norms and logits are float32.
      encoding: name and hyper-parameters; one instance serves all layers if its class is `shared`, else one per layer.
      temperature: of attention, on the layers it names; none if not given.
      vocab_size: tokens V.
      max_length: length in tokens that training reaches, which some encodings depend on.

    Attributes:
      pattern: a letter per layer, E with the encoding, N without. Without any E, embeddings have no encoding either.
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoding: EncodingConfig,
        temperature: TemperatureConfig | None = None,
        *,
        vocab_size: int,
        max_length: int,
        rngs: nnx.Rngs,
    ):
        self.dropout, self.remat, self.window = config.dropout, config.remat, config.window
        self.pattern = "".join(itertools.islice(itertools.cycle(config.pattern), config.num_layers))
        self.dtype = jnp.dtype(config.dtype)
        D = config.d_model
        embedding = jax.random.normal(rngs.params(), (vocab_size, D), jnp.float32) / math.sqrt(D)
        self.embedding = nnx.Param(embedding)
        dims = Dims(D, config.num_heads, config.num_kv_heads, config.head_dim, max_length)
        self.without = encodings.build("none", dims, rngs)
        hyperparameters = vars(encoding.hyperparameters)
        self.shared = encodings.load(encoding.name).shared
        for i, letter in enumerate("E" if self.shared else self.pattern):
            if letter == "E":
                setattr(self, f"encoding_{i}", encodings.build(encoding.name, dims, rngs, **hyperparameters))
        for i, letter in enumerate(self.pattern):
            own = None
            if temperature is not None and temperature.form != "none" and letter in temperature.layers:
                own = Temperature(temperature, config.num_heads, max_length)
            setattr(self, f"block_{i}", Block(config, own, rngs))
        self.norm = nnx.RMSNorm(D, dtype=self.dtype, rngs=rngs)
        if not config.tied_embeddings:
            self.unembedding = Linear(D, vocab_size, dtype=self.dtype, rngs=rngs)
        self.tied_embeddings = config.tied_embeddings

    @property
    def table_length(self) -> int | None:
        """Positions from here on cannot be read; None: any position can."""
        return self.encoding().table_length

    def encoding(self, layer: int | None = None) -> Encoding:
        """The positional encoding that a layer uses, by default the first layer that has one."""
        if layer is None:
            layer = max(self.pattern.find("E"), 0)
        if self.pattern[layer] == "N":
            return self.without
        return getattr(self, f"encoding_{0 if self.shared else layer}")

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Real[Array, "#B T"] | Real[Array, "layers #B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of the token after each one, in float32.

        Args:
          tokens: token indices.
          positions: position of each token, for all layers or for each; 0 to T - 1 if not given.
          dropout_key: a key to train with dropout; without one, there is none.
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1])[None]
        layers = range(len(self.pattern))
        of_layer = [positions[i] if positions.ndim == 3 else positions for i in layers]
        keys = [None] * (len(layers) + 1)
        if dropout_key is not None and self.dropout:
            keys = list(jax.random.split(dropout_key, len(layers) + 1))
        # Tied embeddings are small enough for the output layer; times sqrt(D) they enter at standard deviation 1.
        x = (self.embedding[...][tokens] * math.sqrt(self.embedding.shape[1])).astype(self.dtype)
        x = dropout(self.encoding().embed(x, of_layer[0]), self.dropout, keys[0])
        for i in layers:
            x = self._run_block(i, x, of_layer[i], keys[i + 1])
        x = self.norm(x).reshape(-1, x.shape[-1])
        if self.tied_embeddings:
            logits = matmul(x, self.embedding[...].astype(x.dtype), True, jnp.float32)
        else:
            logits = self.unembedding(x).astype(jnp.float32)
        return logits.reshape(*tokens.shape, -1)

    def _run_block(self, i: int, x: Array, positions: Array, key: Array | None) -> Array:
        block, encoding = getattr(self, f"block_{i}"), self.encoding(i)
        window = self.window if self.window and self.pattern[i] == "E" else None
        if not self.remat:
            return block(encoding, x, positions, window, key)
        graphdef, state = nnx.split((block, encoding))

        @jax.checkpoint
        def run(state, x, key):
            block, encoding = nnx.merge(graphdef, state)
            return block(encoding, x, positions, window, key)

        return run(state, x, key)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and scale up the others; the identity without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
