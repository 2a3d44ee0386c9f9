r"""Positions added to token embeddings, beside them, or rotating queries and keys: what becomes of a logit.

With token embeddings x and positional embeddings p, addition gives a product of four terms,

.. math:: (x_i + p_i)^T M (x_j + p_j) = x_i^T M x_j + x_i^T M p_j + p_i^T M x_j + p_i^T M p_j, \quad M = W_q W_k^T

of which all but the first depend on where i and j are: the last on their distance alone if M is the identity and p
sinusoidal, and none of them in general. Concatenation, [x; p] with
kernels of both, has the same four terms with a kernel of their own for x and for p: addition is the case in which
these two are equal. A rotation (RoPE) leaves the product of tokens alone, turned by the distance. Source: Ke et al.
2021 (TUPE) for the four terms; Su et al. 2021, section 3.2, for the rotation.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.encodings.base import Encoding
from posenc_jax.models.transformer import Transformer

TERMS = ("content-content", "content-position", "position-content", "position-position")


class Projections(NamedTuple):
    """Kernels to the queries and keys of H heads, whose rows are channels of an embedding."""

    q: Float[Array, "D H d"]
    k: Float[Array, "D H d"]


def positional_embeddings(encoding: Encoding, positions: Real[Array, "T"], width: int) -> Float[Array, "T D"]:
    """What the encoding adds to embeddings."""
    return encoding.embed(jnp.zeros((1, len(positions), width)), positions[None])[0]


def addition_terms(
    x: Float[Array, "T D"],
    p: Float[Array, "T D"],
    kernels: Projections,
    of_positions: Projections | None = None,
) -> Float[np.ndarray, "4 H T T"]:
    """The four terms of the logits, in the order of `TERMS`; with kernels `of_positions`, those of concatenation."""
    own = of_positions or kernels
    queries = [_project(x, kernels.q), _project(p, own.q)]
    keys = [_project(x, kernels.k), _project(p, own.k)]
    terms = [np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1]) for q in queries for k in keys]
    return np.stack(terms)


def rotated_logits(
    x: Float[Array, "T D"], positions: Real[Array, "T"], kernels: Projections, encoding: Encoding
) -> Float[np.ndarray, "H T T"]:
    """Logits of an encoding that turns queries and keys by their positions."""
    q, k = (jnp.asarray(_project(x, kernel), jnp.float32)[None] for kernel in kernels)
    q, k = encoding.rotate(q, k, positions[None], positions[None], (None, None))
    return np.asarray(encoding.scores(q, k, (None, None))[0])


def first_layer_terms(
    model: Transformer, tokens: Int[Array, "T"], positions: Real[Array, "T"]
) -> Float[np.ndarray, "4 H T T"]:
    """The four terms of the first layer's logits in a causal model whose positions are added to embeddings.

    The norm before attention divides tokens and positions by what it finds of their sum, so the terms are exact.
    """
    norm, attention = model.block(0).attention_norm, model.block(0).attention
    if not isinstance(norm, nnx.RMSNorm) or model.post_norm or attention.qk_norm or attention.q.bias is not None:
        raise ValueError("these terms are those of a pre-norm model with RMSNorm, without qk_norm and biases")
    assert norm.scale is not None
    x = model.embed(tokens[None])[0]
    p = positional_embeddings(model.encoding(), positions, x.shape[-1])
    scale = norm.scale[...]
    size = jnp.sqrt(((x + p) ** 2).mean(axis=-1, keepdims=True) + norm.epsilon)
    return addition_terms(x / size * scale, p / size * scale, layer_kernels(model))


def first_layer_logits(
    model: Transformer, tokens: Int[Array, "T"], positions: Real[Array, "T"]
) -> Float[np.ndarray, "H T T"]:
    """Logits of the first layer, before any bias and mask."""
    encoding, block = model.encoding(), model.block(0)
    x = block.attention_norm(encoding.embed(model.embed(tokens[None]), positions[None]))
    q, k, _ = block.attention.project(x)
    ctx = encoding.prepare(x, positions[None])
    q, k = encoding.rotate(q, k, positions[None], positions[None], ctx)
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    return np.asarray(encoding.scores(q, k, ctx)[0])


def layer_kernels(model: Transformer) -> Projections:
    """The first layer's kernels of queries and keys, those of keys repeated for each query head that they serve."""
    attention = model.block(0).attention
    D, d = attention.q.in_features, attention.head_dim
    q, k = (linear.kernel[...].reshape(D, -1, d) for linear in (attention.q, attention.k))
    return Projections(q, jnp.repeat(k, attention.num_heads // attention.num_kv_heads, axis=1))


def relative_change(before: Float[np.ndarray, "*S"], after: Float[np.ndarray, "*S"]) -> float:
    """The root mean square of a difference, relative to that of what was there before."""
    return float(np.sqrt(((after - before) ** 2).mean() / (before**2).mean()))


def _project(x: Float[Array, "T D"], kernel: Float[Array, "D H d"]) -> Float[np.ndarray, "T H d"]:
    return np.einsum("tc,chd->thd", np.asarray(x, np.float64), np.asarray(kernel, np.float64))
