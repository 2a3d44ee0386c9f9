"""What all language models share: token embeddings at one end, a softmax over the vocabulary at the other."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.config import ModelConfig
from posenc_jax.distributed.parallel import gather_width
from posenc_jax.linear import Linear
from posenc_jax.models.cross_entropy import cross_entropy, logits


class LanguageModel(nnx.Module):
    """Logits of tokens: `unembed` of the `states` of `embed`, of which a model has its own `states`.

    Args:
      config: widths and options; activations have `config.dtype`, parameters and logits are float32.
      vocab_size: tokens V that are predicted.
      extra_tokens: further tokens, from V on, that are read and never predicted.
    """

    table_length: ClassVar[int | None] = None  # positions from here on cannot be read; None: any position can

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs, extra_tokens: int = 0):
        D, self.dtype = config.d_model, jnp.dtype(config.dtype)
        self.vocab_size, self.num_layers = vocab_size, config.num_layers
        self.dropout, self.remat = config.dropout, config.remat
        shape = (vocab_size + extra_tokens, D)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(D))
        self.unembedding = None if config.tied_embeddings else Linear(D, vocab_size, dtype=self.dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Real[Array, "#B T"] | Real[Array, "layers #B T"] | None = None,
        *,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, in float32: of the token after each one or, where tokens ahead are seen, of the token itself.

        Args:
          tokens: token indices.
          positions: position of each token, for all layers or for each; 0 to T - 1 if not given. A recurrent model,
            which reads tokens in their order, does not look at them.
          dropout_key: a key to train with dropout; without one, there is none.
        """
        return self.unembed(self.states(self.embed(tokens), positions, dropout_key=dropout_key))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings: small enough for a tied output layer, times sqrt(D) they have standard deviation 1."""
        return (gather_width(self.embedding[...])[tokens] * math.sqrt(self.embedding.shape[1])).astype(self.dtype)

    def states(
        self, x: Float[Array, "B T D"], positions: Real[Array, "..."] | None = None, *, dropout_key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """What the layers make of token embeddings, as the output layer takes it."""
        raise NotImplementedError

    def output(
        self, states: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "W D"], Float[Array, "V"] | None]:
        """What logits are products of: vectors and a kernel, whose first V rows are the tokens'; and what is added."""
        return states, self.embedding[...] if self.unembedding is None else self.unembedding.kernel[...].T, None

    def unembed(self, states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of states, in float32."""
        return logits(*self.output(states), self.vocab_size)

    def cross_entropy(self, states: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Nats of targets under the logits of states, which are never all held if they are many."""
        return cross_entropy(*self.output(states), self.vocab_size, targets)

    def dropout_keys(self, key: Array | None, count: int) -> list[Array | None]:
        """A key for each of the places that drop, None where nothing is dropped."""
        return [None] * count if key is None or not self.dropout else list(jax.random.split(key, count))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and scale up the others; the identity without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
