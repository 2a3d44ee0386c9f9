"""Text that a model continues, token by token, with a cache of what it has read."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Key, Real

from posenc_jax.distributed import sharding
from posenc_jax.models.language_model import LanguageModel, Positions

STEP = 512  # tokens; the capacity of a cache is a multiple, at first a power of two

Choose = Callable[[Float[Array, "B V"], Key[Array, "B"]], Int[Array, "B"]]


class Decoder:
    """Reads rows of tokens of one length, and computes the logits of the token after them.

    A `cacheable` model reads each token once. One compiled program reads a token and updates the cache in place. It is
    compiled again only when the cache grows, to twice its capacity. For other models the program reads the whole text.

    Args:
      graphdef: structure of a causal model.
      params: its parameters.
      constants: its other arrays.
      total: the most tokens that are read.
      positions: those of all `total` tokens, in the form that the model takes. Default: 0 to total - 1.
      choose: called with the logits and keys of the rows; returns what a call returns. Default: the logits.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Any,
        constants: Any,
        total: int,
        positions: Real[np.ndarray, "*layers #B total"] | None = None,
        choose: Choose | None = None,
    ):
        self._program, self._arrays = _program(graphdef, choose), (params, constants)
        self._total, self._positions = total, positions
        self._read, self._capacity, self._cache = 0, 0, None

    def __call__(
        self, tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"], keys: Key[Array, "B"] | None = None
    ) -> Float[Array, "B V"] | Int[Array, "B"]:
        """Read T tokens that follow those read before, and return what is chosen, by default the logits."""
        self._read += tokens.shape[1]
        if self._read > self._total:
            raise ValueError(
                f"tokens.shape[1] = {tokens.shape[1]}: must not exceed total = {self._total} with those read"
            )
        if self._read > self._capacity:
            most = -(-self._total // STEP) * STEP
            self._capacity = min(max(STEP, 1 << (self._read - 1).bit_length()), most)
            self._cache = _grown(self._cache, self._capacity)
        positions = self._positions
        if positions is not None:  # those of empty slots are not read
            wider = [(0, 0)] * (positions.ndim - 1) + [(0, max(self._capacity - self._total, 0))]
            positions = np.pad(positions, wider, mode="edge")[..., : self._capacity]
        arguments = *self._arrays, self._cache, tokens, positions, keys
        self._cache, out = self._program(*arguments, capacity=self._capacity if self._cache is None else None)
        return out

    @property
    def compilations(self) -> int:
        """The number of programs compiled for this structure and choice."""
        return self._program._cache_size()


@functools.lru_cache(maxsize=4)
def _program(graphdef: nnx.GraphDef, choose: Choose | None) -> Any:
    """The compiled program of all decoders of one structure."""

    options = sharding.forward_options()

    @functools.partial(jax.jit, static_argnames="capacity", donate_argnames="cache", compiler_options=options)
    def read(params, constants, cache, tokens, positions, keys, *, capacity):
        model = nnx.merge(graphdef, params, constants)
        if cache is None:
            cache = model.new_cache(capacity) if model.cacheable else [TextCache(capacity)]
        if model.cacheable:
            states = model.states(model.embed(tokens), positions, cache=cache)[:, -1:]
        else:
            states = cache[0].states(model, tokens, positions)
        logits = model.unembed(states)[:, 0]
        return cache, logits if choose is None else choose(logits, keys)

    return read


@functools.partial(jax.jit, static_argnames="capacity")
def _grown(cache: Any, capacity: int) -> Any:
    return None if cache is None else [part.grown(capacity) for part in cache]


@jax.tree_util.register_dataclass
@dataclass
class TextCache:
    """The tokens themselves, for a model that is not `cacheable`."""

    capacity: int = field(metadata={"static": True})
    length: int | Int[Array, ""] = 0
    tokens: Int[Array, "B C"] | None = None

    def states(self, model: LanguageModel, tokens: Int[Array, "B T"], positions: Positions) -> Float[Array, "B 1 D"]:
        """Add T tokens, and compute the states of the last one from all tokens.

        Empty slots hold token 0. They come after all tokens, so they change nothing in a causal model. Slots beyond a
        table of positions stay empty and are not read.
        """
        text = jnp.zeros((len(tokens), self.capacity), jnp.int32) if self.tokens is None else self.tokens
        self.tokens = lax.dynamic_update_slice_in_dim(text, tokens.astype(jnp.int32), self.length, axis=1)
        self.length = jnp.asarray(self.length + tokens.shape[1], jnp.int32)
        read = self.tokens[:, : model.table_length]
        own = None if positions is None else positions[..., : read.shape[1]]
        return lax.dynamic_slice_in_dim(model.states(model.embed(read), own), self.length - 1, 1, axis=1)

    def grown(self, capacity: int) -> "TextCache":
        assert self.tokens is not None
        return TextCache(capacity, self.length, jnp.pad(self.tokens, ((0, 0), (0, capacity - self.capacity))))


def continuations(
    decoder: Decoder, prompts: Sequence[np.ndarray], tokens: int, keys: Key[Array, "B"]
) -> Iterator[list[int | None]]:
    """The new tokens of each prompt: a list per step, with None for a prompt that has none at this step.

    The decoder must choose tokens. Row r of the prompts has the key `keys[r]`, and a new key for each of its tokens.
    Prompts of different lengths are read together up to about the end of the shortest, and then token by token. The
    next step is computed while the caller uses this one.
    """
    lengths = [len(prompt) for prompt in prompts]
    first, longest = min(lengths), max(lengths)
    if first < longest:  # few programs for many batches: one for each eighth of a power of two
        first -= first % (1 << max(first.bit_length() - 4, 0))
    given = np.full((len(prompts), longest), -1, np.int32)
    for row, prompt in zip(given, prompts, strict=True):
        row[: len(prompt)] = prompt
    total = longest + tokens
    chosen = decoder(given[:, :first], _fold_in(keys, first))
    for index in range(first, total):
        if index < longest:
            chosen = jnp.where(given[:, index] < 0, chosen, given[:, index])
        now = chosen
        if index + 1 < total:
            chosen = decoder(now[:, None], _fold_in(keys, index + 1))
        new = [length <= index < length + tokens for length in lengths]
        if any(new):
            yield [token if own else None for token, own in zip(np.asarray(now).tolist(), new, strict=True)]


@jax.jit
def _fold_in(keys: Key[Array, "B"], index: Int[Array, ""] | int) -> Key[Array, "B"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
