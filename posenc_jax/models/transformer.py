"""The transformer that takes any positional encoding: a decoder, or an encoder without the causal mask."""

import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from posenc_jax import encodings
from posenc_jax.attention import Attention
from posenc_jax.attention.cached import LayerCache
from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import EncodingConfig, TemperatureConfig, TransformerConfig
from posenc_jax.distributed.parallel import map_tokens, shard_tokens
from posenc_jax.encodings.base import AttentionMask, Dims, Encoding, reads_both_ways
from posenc_jax.linear import Linear
from posenc_jax.models.language_model import LanguageModel, Output, Positions, dropout
from posenc_jax.schema import ConfigError


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020) or GELU block, on tokens flattened to one axis."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, out_stddev: float):
        options = {"use_bias": config.use_bias, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        widths = [config.d_ff] * (2 if config.activation == "swiglu" else 1)
        out_init = nnx.initializers.variance_scaling(out_stddev**2, "fan_in", "normal")
        *gate, self.up = Linear(config.d_model, sum(widths), **options).split(*widths)
        self.gate = gate[0] if gate else None
        self.down = Linear(config.d_ff, config.d_model, kernel_init=out_init, **options)

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        hidden = jax.nn.gelu(self.up(x)) if self.gate is None else jax.nn.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual connection, pre-norm or post-norm."""

    def __init__(self, config: TransformerConfig, temperature: Temperature | None, rngs: nnx.Rngs):
        out_stddev = 1 / math.sqrt(2 * config.num_layers)  # the residual stream sums 2 num_layers branches
        self.dropout, self.post_norm = config.dropout, config.post_norm
        self.attention_norm = norm(config, rngs)
        self.attention = Attention(config, rngs, temperature=temperature, out_stddev=out_stddev)
        self.feed_forward_norm = norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs, out_stddev)

    def __call__(
        self,
        encoding: Encoding,
        x: Float[Array, "B T D"],
        positions: Array,
        mask: AttentionMask,
        key: Array | None,
        cache: LayerCache | None = None,
    ) -> Float[Array, "B T D"]:
        def attend(x):
            return self.attention(encoding, x, positions, mask, cache)

        def feed_forward(x):
            return map_tokens(lambda x: self.feed_forward(x.reshape(-1, x.shape[-1])).reshape(x.shape), x)

        keys = (None, None) if key is None else jax.random.split(key)
        x = self._add(x, attend, self.attention_norm, keys[0])
        return self._add(x, feed_forward, self.feed_forward_norm, keys[1])

    def _add(self, x, branch, norm, key):
        if self.post_norm:
            return norm(x + dropout(branch(x), self.dropout, key))
        return x + dropout(branch(norm(x)), self.dropout, key)


class PredictionHead(nnx.Module):
    """BERT's head for masked tokens: a GELU layer and a norm before the output layer, and an output bias."""

    def __init__(self, config: TransformerConfig, vocab_size: int, rngs: nnx.Rngs):
        D, dtype = config.d_model, jnp.dtype(config.dtype)
        self.hidden = Linear(D, D, use_bias=config.use_bias, dtype=dtype, rngs=rngs)
        self.norm = norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(vocab_size, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.norm(jax.nn.gelu(self.hidden(x.reshape(-1, x.shape[-1])))).reshape(x.shape)


def encoding_dims(config: TransformerConfig, max_length: int) -> Dims:
    """The sizes that an encoding depends on; `max_length` bounds the positions of the first training."""
    return Dims(config.d_model, config.num_heads, config.num_kv_heads, config.head_dim, max_length)


class Transformer(LanguageModel):
    """A transformer language model with any one positional encoding.

    A causal model predicts the next token. In a model that is not causal every token attends to all others, as in BERT
    (Devlin et al. 2019, section 3): token V is the mask token, and the logits at each position are those of the token
    that is masked there.

    Args:
      config: widths and options; activations have `config.dtype`, parameters, norms and logits are float32.
      encoding: name and hyper-parameters. All layers share one instance if its class is `shared`; otherwise each layer
        has its own.
      temperature: attention temperature, on the layers that it names; none if not given.
      vocab_size: number V of tokens.
      max_length: upper bound of the positions in the first training; some encodings depend on it.

    Attributes:
      pattern: one letter per layer: E with the encoding, N without. If no layer has an E, embeddings have no encoding
        either.

    Raises:
      ConfigError: the model is not causal, and the encoding is defined only for keys behind the query.
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
        super().__init__(config, vocab_size=vocab_size, rngs=rngs, extra_tokens=0 if config.causal else 1)
        self.causal, self.window, self.post_norm = config.causal, config.window, config.post_norm
        self.pattern = "".join(itertools.islice(itertools.cycle(config.pattern), config.num_layers))
        dims = encoding_dims(config, max_length)
        self.without = encodings.build("none", dims, rngs)
        hyperparameters = vars(encoding.hyperparameters)
        self.shared = encodings.load(encoding.name).shared
        for i, letter in enumerate("E" if self.shared else self.pattern):
            if letter == "E":
                setattr(self, f"encoding_{i}", encodings.build(encoding.name, dims, rngs, **hyperparameters))
        if not config.causal and not reads_both_ways(self.encoding()):
            allowed = "must act on embeddings, or on queries and keys alone, in a model that is not causal"
            raise ConfigError("config.encoding.name", encoding.name, allowed)
        for i, letter in enumerate(self.pattern):
            own = None
            if temperature is not None and temperature.form != "none" and letter in temperature.layers:
                own = Temperature(temperature, config.num_heads, max_length)
            setattr(self, f"block_{i}", Block(config, own, rngs))
        self.norm = norm(config, rngs)
        self.head = None if config.causal else PredictionHead(config, vocab_size, rngs)

    @property
    def table_length(self) -> int | None:
        """Largest number of positions that can be read, if there is a table of positions; None: any position."""
        return self.encoding().table_length

    def encoding(self, layer: int | None = None) -> Encoding:
        """The positional encoding of a layer, by default that of the first layer that has one."""
        if layer is None:
            layer = max(self.pattern.find("E"), 0)
        if self.pattern[layer] == "N":
            return self.without
        return getattr(self, f"encoding_{0 if self.shared else layer}")

    def block(self, layer: int) -> Block:
        return getattr(self, f"block_{layer}")

    @property
    def cacheable(self) -> bool:
        return all(self.encoding(i).cacheable for i in range(self.num_layers))

    def new_cache(self, capacity: int) -> list[LayerCache]:
        """Raises ValueError for a model that is not causal or not `cacheable`."""
        if not (self.causal and self.cacheable):
            why = f"{type(self.encoding()).__name__} is not cacheable" if self.causal else "the model is not causal"
            raise ValueError(f"a cache would not give the same states: {why}")
        return [LayerCache(capacity) for _ in range(self.num_layers)]

    def states(
        self,
        x: Float[Array, "B T D"],
        positions: Positions = None,
        *,
        dropout_key: Array | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Array, "B T D"]:
        contiguous = positions is None
        if positions is None:
            positions = jnp.arange(x.shape[1] if cache is None else cache[0].capacity)[None]
        layers = range(self.num_layers)
        of_layer = [positions[i] if positions.ndim == 3 else positions for i in layers]
        keys = self.dropout_keys(dropout_key, self.num_layers + 1)
        of_tokens = of_layer[0] if cache is None else cache[0].next_positions(of_layer[0], x.shape[1])
        x = shard_tokens(self.encoding().embed(x, of_tokens))
        if self.post_norm:  # blocks normalise their output, so the final norm normalises the input of the first block
            x = self.norm(x)
        x = dropout(x, self.dropout, keys[0])
        for i in layers:
            own = None if cache is None else cache[i]
            x = self._run_block(i, x, of_layer[i], contiguous, keys[i + 1], own)
        return x if self.post_norm else self.norm(x)

    def output(self, states: Float[Array, "B T D"]) -> Output:
        if self.head is None:
            return super().output(states)
        return *super().output(self.head(states))[:2], self.head.bias[...]

    def _run_block(
        self, i: int, x: Array, positions: Array, contiguous: bool, key: Array | None, cache: LayerCache | None
    ) -> Array:
        block, encoding = self.block(i), self.encoding(i)
        window = self.window if self.window and self.pattern[i] == "E" else None
        mask = AttentionMask(self.causal, window, contiguous)
        if cache is not None or not self.remat:
            return block(encoding, x, positions, mask, key, cache)
        graphdef, state = nnx.split((block, encoding))

        @jax.checkpoint
        def run(state, x, key):
            block, encoding = nnx.merge(graphdef, state)
            return block(encoding, x, positions, mask, key)

        return run(state, x, key)


def norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """RMSNorm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016) over the residual stream."""
    kind = nnx.RMSNorm if config.norm == "rms" else nnx.LayerNorm
    return kind(config.d_model, dtype=jnp.dtype(config.dtype), rngs=rngs)
