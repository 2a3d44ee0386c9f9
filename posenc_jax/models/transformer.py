"""The transformer that takes any positional encoding: a decoder, or an encoder without the causal mask."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from posenc_jax import encodings
from posenc_jax.attention import Attention
from posenc_jax.attention.cached import LayerCache
from posenc_jax.attention.temperature import Temperature
from posenc_jax.config import EncodingConfig, LayersConfig, TemperatureConfig, TransformerConfig
from posenc_jax.distributed.parallel import map_tokens, shard_tokens
from posenc_jax.documents import places
from posenc_jax.encodings.base import AttentionMask, Dims, Encoding, overrides, reads_both_ways
from posenc_jax.layer_config import ALIKE, ENCODING, Layer, layers_of
from posenc_jax.linear import Linear
from posenc_jax.models.language_model import LanguageModel, Output, Positions, dropout
from posenc_jax.schema import ConfigError


class FeedForward(nnx.Module):
    """SwiGLU or GEGLU (Shazeer 2020), or GELU block, on tokens flattened to one axis."""

    def __init__(self, config: TransformerConfig, rngs: nnx.Rngs, out_stddev: float):
        options = {"use_bias": config.use_bias, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
        widths = [config.d_ff] * (2 if config.gated else 1)
        out_init = nnx.initializers.variance_scaling(out_stddev**2, "fan_in", "normal")
        *gate, self.up = Linear(config.d_model, sum(widths), **options).split(*widths)
        self.gate = gate[0] if gate else None
        self.down = Linear(config.d_ff, config.d_model, kernel_init=out_init, **options)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N D"]:
        activate = _activation(self.activation)
        return self.down(activate(self.up(x)) if self.gate is None else activate(self.gate(x)) * self.up(x))


def _activation(name: str) -> Callable[[Array], Array]:
    return jax.nn.silu if name == "swiglu" else functools.partial(jax.nn.gelu, approximate=name != "gelu_exact")


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual connection.

    Norms come before each branch or, with `post_norm`, after each residual sum. With `branch_norm`, the output of each
    branch is normalized too (Gemma 2). With `parallel_residual`, both branches read the same input (GPT-NeoX).
    """

    def __init__(self, config: TransformerConfig, temperature: Temperature | None, head_factor: int, rngs: nnx.Rngs):
        out_stddev = 1 / math.sqrt(2 * config.num_layers)  # the residual stream sums 2 num_layers branches
        self.dropout, self.post_norm, self.parallel = config.dropout, config.post_norm, config.parallel_residual
        self.attention_norm = norm(config, rngs)
        attention = {"temperature": temperature, "head_factor": head_factor, "out_stddev": out_stddev}
        self.attention = Attention(config, rngs, **attention)
        self.feed_forward_norm = norm(config, rngs)
        self.feed_forward = FeedForward(config, rngs, out_stddev)
        self.attention_out_norm = norm(config, rngs) if config.branch_norm else None
        self.feed_forward_out_norm = norm(config, rngs) if config.branch_norm else None

    def __call__(
        self,
        encoding: Encoding,
        x: Float[Array, "B T D"],
        positions: Array,
        mask: AttentionMask,
        key: Array | None,
        cache: LayerCache | None = None,
        documents: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        def attend(x):
            return self.attention(encoding, x, positions, mask, cache, documents)

        def feed_forward(x):
            return map_tokens(lambda x: self.feed_forward(x.reshape(-1, x.shape[-1])).reshape(x.shape), x)

        keys = (None, None) if key is None else jax.random.split(key)
        if self.post_norm:
            x = self.attention_norm(x + dropout(attend(x), self.dropout, keys[0]))
            return self.feed_forward_norm(x + dropout(feed_forward(x), self.dropout, keys[1]))
        attended = self._branch(x, attend, self.attention_norm, self.attention_out_norm, keys[0])
        read = x if self.parallel else x + attended
        fed = self._branch(read, feed_forward, self.feed_forward_norm, self.feed_forward_out_norm, keys[1])
        return x + attended + fed

    def _branch(self, x, branch, norm, out_norm, key):
        out = branch(norm(x))
        return dropout(out if out_norm is None else out_norm(out), self.dropout, key)


class PredictionHead(nnx.Module):
    """BERT's head for masked tokens: a GELU layer and a norm before the output layer, and an output bias."""

    def __init__(self, config: TransformerConfig, vocab_size: int, rngs: nnx.Rngs):
        D, dtype = config.d_model, jnp.dtype(config.dtype)
        self.hidden = Linear(D, D, use_bias=config.use_bias, dtype=dtype, rngs=rngs)
        self.activation = config.activation
        self.norm = norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros(vocab_size, jnp.float32))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = self.hidden(x.reshape(-1, x.shape[-1]))
        activate = functools.partial(jax.nn.gelu, approximate=self.activation != "gelu_exact")
        return self.norm(activate(hidden)).reshape(x.shape)


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
      sections: what the layers of some letters of `config.pattern` have of their own; nothing if not given.
      vocab_size: number V of tokens.
      max_length: upper bound of the positions in the first training; some encodings depend on it.

    Attributes:
      modules: for each layer the name of the attribute that holds its encoding. Embeddings have the encoding of the
        first layer that uses `encoding`.

    Raises:
      ConfigError: a letter of the pattern has no meaning; some layers have an encoding of their own that adds to
        embeddings; the model is not causal, and an encoding is defined only for keys behind the query; attention logits
        have a soft cap, and an encoding computes them in its own way; or attention has sinks, and an encoding has no
        softmax.
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoding: EncodingConfig,
        temperature: TemperatureConfig | None = None,
        sections: LayersConfig = ALIKE,
        *,
        vocab_size: int,
        max_length: int,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, vocab_size=vocab_size, rngs=rngs, extra_tokens=0 if config.causal else 1)
        self.logit_softcap = config.logit_softcap
        if not config.scale_embeddings:
            self.embedding_scale = 1.0
        self.causal, self.post_norm = config.causal, config.post_norm
        layers = layers_of(config, encoding, temperature, sections)
        dims = encoding_dims(config, max_length)
        self.without = encodings.build("none", dims, rngs)
        if encodings.load(encoding.name).shared:
            self.encoding_0 = encodings.build(encoding.name, dims, rngs, **vars(encoding.hyperparameters))
        for layer in layers:
            if not hasattr(self, layer.module):
                own = encodings.build(layer.encoding.name, dims, rngs, **vars(layer.encoding.hyperparameters))
                setattr(self, layer.module, own)
        self.modules, self.windows = tuple(layer.module for layer in layers), tuple(layer.window for layer in layers)
        common = (i for i, layer in enumerate(layers) if layer.path == ENCODING and layer.letter != "N")
        self.embedded = next(common, 0)  # the layer whose encoding adds to embeddings
        for i, layer in enumerate(layers):
            self._check(layer, self.encoding(i), config)
            self.encoding(i).softcap = self.without.softcap = config.attention_softcap
        for i, layer in enumerate(layers):
            factor, own = self.encoding(i).head_factor, None
            if layer.temperature is not None:
                own = Temperature(layer.temperature, factor * config.num_heads, max_length)
            block = Block(replace(config, attention_sinks=layer.attention_sinks), own, factor, rngs)
            setattr(self, f"block_{i}", block)
        self.embedding_norm = norm(config, rngs) if config.embedding_norm else None
        self.norm = norm(config, rngs)
        self.head = None if config.causal else PredictionHead(config, vocab_size, rngs)

    @staticmethod
    def _check(layer: Layer, encoding: Encoding, config: TransformerConfig) -> None:
        """Raise ConfigError for an encoding that does not fit the settings of the model."""
        name = layer.encoding.name
        if layer.path != ENCODING and overrides(encoding, "embed"):
            allowed = "must not add to embeddings, which all layers share; choose it as config.encoding.name"
            raise ConfigError(f"{layer.path}.name", name, allowed)
        if layer.attention_sinks and overrides(encoding, "weights"):
            allowed = f"must be False for encoding {name!r}, which has no softmax"
            section = "model" if config.attention_sinks else f"layers.{layer.letter}"
            raise ConfigError(f"config.{section}.attention_sinks", True, allowed)
        if config.attention_softcap and overrides(type(encoding), "scores", "scan_step"):
            allowed = f"must be 0 for encoding {name!r}, which computes logits in its own way"
            raise ConfigError("config.model.attention_softcap", config.attention_softcap, allowed)
        if not config.causal and not reads_both_ways(encoding):
            allowed = "must be defined for keys ahead of the query, because the model is not causal"
            if hasattr(layer.encoding.hyperparameters, "bidirectional"):
                allowed += f"; {name} is with {layer.path}.bidirectional = True"
            raise ConfigError(f"{layer.path}.name", name, allowed)

    @property
    def table_length(self) -> int | None:
        """Largest number of positions that can be read, if there is a table of positions; None: any position."""
        lengths = [self.encoding(i).table_length for i in range(self.num_layers)]
        return min((length for length in lengths if length is not None), default=None)

    def encoding(self, layer: int | None = None) -> Encoding:
        """The positional encoding of a layer, by default the one that adds to embeddings, if any does."""
        return getattr(self, self.modules[self.embedded if layer is None else layer])

    def drop_encodings(self) -> None:
        """Turn all layers into those of letter N (DroPE, Gelberg et al. 2025). The arrays of encodings remain."""
        self.modules, self.windows = ("without",) * self.num_layers, (0,) * self.num_layers

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
        documents: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Array, "B T D"]:
        contiguous = positions is None
        if positions is None and documents is not None:
            positions = places(documents)
        elif positions is None:
            positions = jnp.arange(x.shape[1] if cache is None else cache[0].capacity)[None]
        layers = range(self.num_layers)
        of_layer = [positions[i] if positions.ndim == 3 else positions for i in layers]
        keys = self.dropout_keys(dropout_key, self.num_layers + 1)
        of_tokens = of_layer[0] if cache is None else cache[0].next_positions(of_layer[0], x.shape[1])
        x = shard_tokens(self.encoding().embed(x, of_tokens))
        if self.post_norm:  # blocks normalise their output, so the final norm normalises the input of the first block
            x = self.norm(x)
        elif self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = dropout(x, self.dropout, keys[0])
        for i in layers:
            own = None if cache is None else cache[i]
            x = self._run_block(i, x, of_layer[i], contiguous, keys[i + 1], own, documents)
        return x if self.post_norm else self.norm(x)

    def output(self, states: Float[Array, "B T D"]) -> Output:
        if self.head is None:
            return super().output(states)
        return *super().output(self.head(states))[:2], self.head.bias[...]

    def _run_block(
        self,
        i: int,
        x: Array,
        positions: Array,
        contiguous: bool,
        key: Array | None,
        cache: LayerCache | None,
        documents: Array | None,
    ) -> Array:
        block, encoding = self.block(i), self.encoding(i)
        mask = AttentionMask(self.causal, self.windows[i] or None, contiguous)
        if cache is not None or not self.remat:
            return block(encoding, x, positions, mask, key, cache, documents)
        graphdef, state = nnx.split((block, encoding))

        @jax.checkpoint
        def run(state, x, key):
            block, encoding = nnx.merge(graphdef, state)
            return block(encoding, x, positions, mask, key, documents=documents)

        return run(state, x, key)


def norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """RMSNorm (Zhang and Sennrich 2019) or layer norm (Ba et al. 2016) over the residual stream."""
    kind = nnx.RMSNorm if config.norm == "rms" else nnx.LayerNorm
    return kind(config.d_model, epsilon=config.norm_eps, dtype=jnp.dtype(config.dtype), rngs=rngs)
