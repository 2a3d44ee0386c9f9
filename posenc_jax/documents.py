"""Documents that share a window: which tokens belong together, and sums that stay within a document.

`documents` [B, S] is the number of each token's document, int32. The tokens of a document are next to each other, and
numbers increase from one document to the next.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Documents = tuple[Int[Array, "B T"], Int[Array, "B S"]]  # those of the queries, which are the last tokens, and of keys


def places(documents: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The index of each token in its document: 0, 1, 2 .. from every first token."""
    index = jnp.arange(documents.shape[1])
    return index - lax.cummax(jnp.where(first_tokens(documents), index, 0), axis=1)


def first_tokens(documents: Int[Array, "B S"]) -> Bool[Array, "B S"]:
    """True for the first token of each document in the window."""
    changes = documents[:, 1:] != documents[:, :-1]
    return jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)


def same_document(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B 1 T S"]:
    """True where query and key are tokens of one document."""
    return (queries[:, :, None] == keys[:, None, :])[:, None]


def within_documents(
    mask: Bool[Array, "T S"], documents: Documents | None
) -> Bool[Array, "T S"] | Bool[Array, "B 1 T S"]:
    """The mask, which then also hides keys of other documents than the query's. Without documents it is unchanged."""
    return mask if documents is None else mask & same_document(*documents)


def shifted(x: Float[Array, "B T C"], documents: Int[Array, "B T"], tokens: int) -> Float[Array, "B T C"]:
    """For each token the one that is `tokens` before it in its document, or zeros if there is none."""
    earlier = jnp.pad(x, ((0, 0), (tokens, 0), (0, 0)))[:, : x.shape[1]]
    return jnp.where((places(documents) >= tokens)[..., None], earlier, 0)


def sum_within(x: Float[Array, "B T *n"], documents: Int[Array, "B T"]) -> Float[Array, "B T *n"]:
    """The sum of each token and all earlier ones of its document. Other documents change no bit of it."""

    def join(left, right):
        (left_starts, left_sum), (right_starts, right_sum) = left, right
        return left_starts | right_starts, jnp.where(right_starts, right_sum, left_sum + right_sum)

    starts = first_tokens(documents).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
    return lax.associative_scan(join, (starts, x), axis=1)[1]
