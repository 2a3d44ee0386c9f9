r"""Add or rotate: the logits if positions are added to token embeddings, concatenated with them, or rotate q and k.

With token embeddings x and positional embeddings p, addition gives a product of four terms,

.. math:: (x_i + p_i)^T M (x_j + p_j) = x_i^T M x_j + x_i^T M p_j + p_i^T M x_j + p_i^T M p_j, \quad M = W_q W_k^T

All but the first depend on i and j. The last depends on their distance alone if M is the identity and p is sinusoidal;
in general no term does. Concatenation, [x; p], has the same four terms with separate kernels for x and for p; addition
is the case in which these two kernels are equal. A rotation (RoPE) keeps only the product of tokens, rotated by the
distance. Source: Ke et al. 2021 (TUPE) for the four terms; Su et al. 2021, section 3.2, for the rotation.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from experiments.recurrence import figures
from experiments.recurrence.study import Study, table, test_windows
from posenc_jax import encodings
from posenc_jax.encodings.base import Dims, Encoding
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.transformer import Transformer

SHIFT = 1000  # tokens


TERMS = ("content-content", "content-position", "position-content", "position-position")


def part(study: Study) -> Iterable[str]:
    yield "## Add or rotate"
    arms, places = _arms(), jnp.arange(128)
    trained = {name: _model_and_text(study, name) for name in ("sinusoidal", "rope") if name in study.models}
    if "sinusoidal" in trained:
        arms["added, first layer of the trained model"] = partial(first_layer_terms, *trained["sinusoidal"])
    if "rope" in trained:
        logits = partial(first_layer_logits, *trained["rope"])
        arms["RoPE, first layer of the trained model"] = lambda positions: logits(positions)[None]
    yield (
        "Logits between 128 tokens with random embeddings and projections (and in models that were trained), as sums "
        "of terms, each as its root mean square relative to that of the sum; and how much the logits, and the term of "
        f"positions alone, change when all positions are {SHIFT:,} further on: 0 where they depend on distance alone."
    )
    rows = []
    for name, terms_at in arms.items():
        here, there = terms_at(places), terms_at(places + SHIFT)
        total, moved = here.sum(axis=0), there.sum(axis=0)
        shares, alone = ["1", "", "", ""], ""
        if len(here) > 1:
            shares = [f"{np.sqrt((term**2).mean() / (total**2).mean()):.2f}" for term in here]
            alone = f"{relative_change(here[3], there[3]):.2g}"
        rows.append((name, *shares, f"{relative_change(total, moved):.2g}", alone))
    yield table(("positions", *TERMS, "change of logits", "of position-position"), rows)
    yield (
        "Addition is the case of concatenation whose two projections are equal, so it has the same four terms; three "
        "of them tie the content of a token, or a position, to absolute positions. The product of two positions is a "
        "function of distance where the projections are the identity, and not in general. A rotation keeps the product "
        "of contents, turned by the distance: shifting everything changes nothing but rounding."
    )
    if "sinusoidal" in trained:
        terms = first_layer_terms(*trained["sinusoidal"], places)[:, 0]
        figure = figures.logit_terms(dict(zip(TERMS, terms, strict=True)))
        yield study.save(figure, "addition_terms", "The four terms of the first layer's logits, trained model")


def _arms() -> dict[str, Callable[[Array], Float[np.ndarray, "terms H T T"]]]:
    """The terms of the logits of random embeddings and projections, as functions of the positions."""
    dims = Dims(d_model=128, num_heads=2, num_kv_heads=2, head_dim=64, max_length=256)
    sinusoidal, rope = (encodings.build(name, dims, nnx.Rngs(0)) for name in ("sinusoidal", "rope"))
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (128, dims.d_model))
    kernels = [jax.random.normal(key, (128, 2, 64)) / np.sqrt(128) for key in keys[1:]]
    own, other = Projections(*kernels[:2]), Projections(*kernels[2:])
    identity = Projections(*[jnp.eye(128).reshape(128, 2, 64)] * 2)

    def terms(kernels, of_positions, positions):
        return addition_terms(x, positional_embeddings(sinusoidal, positions, dims.d_model), kernels, of_positions)

    return {
        "added, before the projections": partial(terms, own, None),
        "beside the embedding (concatenated)": partial(terms, own, other),
        "added, projections the identity": partial(terms, identity, None),
        "rotating queries and keys (RoPE)": lambda positions: rotated_logits(x, positions, own, rope)[None],
    }


def _model_and_text(study: Study, name: str) -> tuple[LanguageModel, Array]:
    """A trained model, and the first 128 tokens of the text it is evaluated on."""
    run = study.trained(name)
    return run.model, jnp.asarray(test_windows(run.config, 128, 1)[0, :128])


class Projections(NamedTuple):
    """Kernels to the queries and keys of H heads, whose rows are channels of an embedding."""

    q: Float[Array, "D H d"]
    k: Float[Array, "D H d"]


def positional_embeddings(encoding: Encoding, positions: Real[Array, "T"], width: int) -> Float[Array, "T D"]:
    """What the encoding adds to embeddings."""
    return encoding.embed(jnp.zeros((1, len(positions), width)), positions[None])[0]


def addition_terms(
    x: Float[Array, "T D"], p: Float[Array, "T D"], kernels: Projections, of_positions: Projections | None = None
) -> Float[np.ndarray, "4 H T T"]:
    """The four terms of the logits, in the order of `TERMS`; with kernels `of_positions`, those of concatenation."""
    pairs = ((x, kernels), (p, of_positions or kernels))
    queries, keys = [_project(y, own.q) for y, own in pairs], [_project(y, own.k) for y, own in pairs]
    return np.stack([np.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1]) for q in queries for k in keys])


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
