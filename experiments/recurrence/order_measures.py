"""Whether a model knows the order of what it reads: what becomes of its states when the same tokens come otherwise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.recurrent import ELMo


def word_orders(text: bytes) -> Int[np.ndarray, "orders T"]:
    """Every order of the words of a text, as the old index of each byte; a word takes the space before it along.

    The first row is the text as it is. Raises ValueError for more than 7 words, which have too many orders.
    """
    starts = [i for i in range(len(text)) if i == 0 or (text[i] == 32 and text[i - 1] != 32)]
    if len(starts) > 7:
        raise ValueError(f"a text of {len(starts)} words has too many orders; take at most 7")
    words = [np.arange(start, stop) for start, stop in itertools.pairwise([*starts, len(text)])]
    return np.stack([np.concatenate(order) for order in itertools.permutations(words)])


def representations(model: LanguageModel, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What stands for each token in its context: the states of the last layer; ELMo's of both directions."""
    return model.representations(tokens) if isinstance(model, ELMo) else model.states(model.embed(tokens))


def reordering_change(
    model: LanguageModel, tokens: Int[Array, "T"], orders: Int[np.ndarray, "orders T"]
) -> Float[np.ndarray, "orders"]:
    """How much each order changes what represents the tokens, wherever they come to stand.

    The root mean square of the difference between the representation of reordered tokens and the representations in
    that order, relative to that of the representations: 0 (to rounding) for a model blind to order, about sqrt(2) for
    representations that have nothing in common.
    """
    straight = representations(model, tokens[None])[0]
    reordered = _in_rows(model, tokens[orders])
    return np.asarray(_rms(reordered - straight[orders], (1, 2)) / _rms(straight))


def last_state_change(
    model: LanguageModel, tokens: Int[Array, "T"], orders: Int[np.ndarray, "orders n"]
) -> Float[np.ndarray, "orders"]:
    """How much each order of the first n < T tokens changes the representation of the last, as `reordering_change`."""
    rest = np.arange(orders.shape[1], len(tokens))
    rows = np.concatenate([orders, np.broadcast_to(rest, (len(orders), len(rest)))], axis=1)
    last = _in_rows(model, tokens[rows])[:, -1]
    straight = representations(model, tokens[None])[0, -1]
    return np.asarray(_rms(last - straight, 1) / _rms(straight))


def _in_rows(model: LanguageModel, tokens: Int[Array, "rows T"]) -> Float[Array, "rows T D"]:
    return jax.jit(lambda tokens: representations(model, tokens))(tokens)


def _rms(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    return jnp.sqrt((x.astype(jnp.float32) ** 2).mean(axis=axis))
