"""What all language models share: token embeddings at one end, a softmax over the vocabulary at the other."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.config import ModelConfig
from posenc_jax.distributed.parallel import gather_width
from posenc_jax.linear import Linear
from posenc_jax.models.cross_entropy import cross_entropy, logits

# Positions of P = T tokens, or of the P slots of a cache, for all layers or per layer. None: 0 to P - 1, or with
# documents 0, 1, 2 .. in each of them.
Positions = Real[Array, "#B P"] | Real[Array, "layers #B P"] | None
# The input of the output layer, its kernel, whose first V rows belong to the tokens, and its bias.
Output = tuple[Float[Array, "B T D"], Float[Array, "W D"], Float[Array, "V"] | None]


class LanguageModel(nnx.Module):
    """Base class: logits are `unembed(states(embed(tokens)))`, and a subclass implements `states`.

    Args:
      config: widths and options; activations have `config.dtype`, parameters and logits are float32.
      vocab_size: number V of tokens that are predicted.
      extra_tokens: number of further tokens, from V on, that are read but never predicted.
    """

    table_length: ClassVar[int | None] = None  # number of positions that can be read; None: any position

    def __init__(self, config: ModelConfig, *, vocab_size: int, rngs: nnx.Rngs, extra_tokens: int = 0):
        D, self.dtype = config.d_model, jnp.dtype(config.dtype)
        self.vocab_size, self.num_layers = vocab_size, config.num_layers
        self.dropout, self.remat = config.dropout, config.remat
        self.embedding_scale, self.logit_softcap = math.sqrt(D), 0.0
        shape = (vocab_size + extra_tokens, D)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(D))
        self.unembedding = None if config.tied_embeddings else Linear(D, vocab_size, dtype=self.dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Positions = None,
        *,
        documents: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits in float32: of the next token, or, in an encoder, of the token at the position itself.

        Recurrent models read tokens in order and ignore `positions`. The tokens may be of several `documents`: see
        `posenc_jax.documents`. The logits of each are those of the document alone. A `dropout_key` enables dropout.
        """
        states = self.states(self.embed(tokens), positions, documents=documents, dropout_key=dropout_key)
        return self.unembed(states)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings times `embedding_scale`.

        It is sqrt(D) by default: the table has a standard deviation of 1/sqrt(D), for a tied output layer.
        """
        return (gather_width(self.embedding[...])[tokens] * self.embedding_scale).astype(self.dtype)

    def states(
        self,
        x: Float[Array, "B T D"],
        positions: Positions = None,
        *,
        documents: Int[Array, "B T"] | None = None,
        dropout_key: Array | None = None,
        cache: Any = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states of the last layer, as the output layer takes them.

        With a `cache`, the T tokens follow those of the cache, which then holds them too. The model must be `cacheable`
        and causal. `positions` are then those of all slots of the cache, and there are no `documents`.
        """
        raise NotImplementedError

    @property
    def cacheable(self) -> bool:
        """Whether `states` with a cache computes the same as without one."""
        return True

    def new_cache(self, capacity: int) -> Any:
        """A cache without tokens for `states`, with as many slots. It is a list with one part per layer."""
        raise NotImplementedError

    def output(self, states: Float[Array, "B T D"]) -> Output:
        """The input of the output layer, its kernel and its bias."""
        return states, self.embedding[...] if self.unembedding is None else self.unembedding.kernel[...].T, None

    def unembed(self, states: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of states, in float32."""
        return logits(*self.output(states), self.vocab_size, self.logit_softcap)

    def cross_entropy(self, states: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """Nats of the targets under the logits of the states, in chunks if the logits are many."""
        return cross_entropy(*self.output(states), self.vocab_size, targets, self.logit_softcap)

    def dropout_keys(self, key: Array | None, count: int) -> list[Array | None]:
        """`count` dropout keys; None for each if there is no dropout."""
        return [None] * count if key is None or not self.dropout else list(jax.random.split(key, count))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and scale up the others; the identity without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
