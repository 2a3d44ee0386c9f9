"""Text that a model continues, token by token, with a cache of what it has read."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key, Real

from posenc_jax.models.language_model import LanguageModel

SMALLEST_CAPACITY = 512  # tokens; caches grow in powers of two from here on


class Decoder:
    """Reads rows of tokens of one length, and computes the logits of the token after them.

    A `cacheable` model reads each token once. Each token takes one compiled program, which updates the cache in place
    and is compiled again only when the cache has to grow. For other models the program computes all tokens again.

    Args:
      graphdef: structure of a causal model.
      params: its parameters.
      constants: its other arrays.
      total: the most tokens of a row.
      positions: those of all `total` tokens, in the form that the model takes. Default: 0 to total - 1.
      choose: called with logits and the keys of rows; computes what a call returns. Default: the logits.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        constants: Any,
        total: int,
        positions: Real[np.ndarray, "*layers #B total"] | None = None,
        choose: Callable[..., Array] | None = None,
    ):
        self._arrays, self._total, self._positions = (params, constants), total, positions
        model = nnx.merge(graphdef, params, constants)
        self.cached = model.cacheable
        self._read = 0
        self._cache: Any = None
        self._capacity = 0

        @functools.partial(jax.jit, static_argnames="capacity", donate_argnames="cache")
        def read(params, constants, cache, tokens, positions, keys, *, capacity):
            model = nnx.merge(graphdef, params, constants)
            cache, states = (cached if model.cacheable else uncached)(model, cache, tokens, positions, capacity)
            logits = model.unembed(states)[:, 0]
            return cache, logits if choose is None else choose(logits, keys)

        self._program = read

    def __call__(self, tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"], keys: Key[Array, "B"] | None = None) -> Array:
        """Read T tokens after those read before. Returns the logits of the next token, [B, V], or what is chosen."""
        self._read += tokens.shape[1]
        if self._read > self._total:
            raise ValueError(f"tokens.shape[1] = {tokens.shape[1]}: must not exceed {self._total} tokens in total")
        if self._read > self._capacity:
            self._capacity = min(max(SMALLEST_CAPACITY, 1 << (self._read - 1).bit_length()), self._total)
        positions = self._positions
        if positions is not None:
            positions = positions[..., : self._capacity]
        arguments = *self._arrays, self._cache, tokens, positions, keys
        self._cache, out = self._program(*arguments, capacity=self._capacity)
        return out

    @property
    def compilations(self) -> int:
        """The number of programs that were compiled."""
        return self._program._cache_size()


def cached(
    model: LanguageModel, cache: Any, tokens: Int[Array, "B T"], positions: Array | None, capacity: int
) -> tuple[Any, Float[Array, "B 1 D"]]:
    """The cache with the tokens, and the states of the last one."""
    cache = model.new_cache(capacity) if cache is None else [layer.grown(capacity) for layer in cache]
    return cache, model.states(model.embed(tokens), positions, cache=cache)[:, -1:]


def uncached(
    model: LanguageModel, cache: Any, tokens: Int[Array, "B T"], positions: Array | None, capacity: int
) -> tuple[Any, Float[Array, "B 1 D"]]:
    """As `cached`, for a model whose cache is the text itself: all tokens, and how many there are.

    The tokens after the last one are 0. They change nothing, because the model is causal.
    """
    text, start = (jnp.zeros((len(tokens), 0), jnp.int32), 0) if cache is None else cache
    text = jnp.pad(text, ((0, 0), (0, capacity - text.shape[1])))
    text = lax.dynamic_update_slice_in_dim(text, tokens.astype(jnp.int32), start, axis=1)
    end = jnp.asarray(start + tokens.shape[1], jnp.int32)
    states = model.states(model.embed(text), positions)
    return (text, end), lax.dynamic_slice_in_dim(states, end - 1, 1, axis=1)


def continuations(
    decoder: Decoder, prompts: Sequence[Int[np.ndarray, "N"]], tokens: int, keys: Key[Array, "B"]
) -> Iterator[list[int | None]]:
    """The new tokens of each prompt: a list per step, with None for a prompt that has none at this step.

    The prompts are read together up to the end of the shortest one, and then token by token. Each gets as many new
    tokens, and the decoder must choose them. The next step is computed while the caller uses this one.
    """
    lengths = [len(prompt) for prompt in prompts]
    shortest, total = min(lengths), max(lengths) + tokens
    rows = np.full((len(prompts), max(lengths)), -1, np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    keys_at = jax.jit(lambda keys, index: jax.vmap(jax.random.fold_in, (0, None))(keys, index))
    chosen = decoder(rows[:, :shortest], keys_at(keys, shortest))
    for index in range(shortest, total):
        if index < max(lengths):  # some prompts go on
            chosen = jnp.where(rows[:, index] < 0, chosen, rows[:, index])
        now = chosen
        if index + 1 < total:
            chosen = decoder(now[:, None], keys_at(keys, index + 1))
        found = np.asarray(now).tolist()
        if any(own := [length <= index < length + tokens for length in lengths]):
            yield [token if new else None for token, new in zip(found, own, strict=True)]
