r"""Computes every array that the walkthrough shows for one sentence, with the project's own encodings.

Axis names: T tokens, V vocabulary size, D model dimension, H heads, d head dimension. Positions are in tokens, angles
in radians. The weights are random, as in a model before training. All other statements hold for any weights.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Real
from scipy.special import softmax

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims, Encoding
from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough.reading import Trained
from posenc_jax.walkthrough.tokens import Tokens, one_hot

BASE: float = encodings.default_config("rope")["base"]  # the same as that of the sinusoidal encoding
SHIFT = 7  # number of tokens by which both positions of the pair are moved
PAIRING = "interleaved"  # channels 2i and 2i + 1 rotate together, as in the RoPE paper
MIN_HEAD_DIM = 8  # four planes of rotation, of which pictures show three
MAX_WEIGHTS = 2**27  # of the embedding matrix: 512 MiB
TABLE_LENGTH = 512  # BERT's
BIAS_SPAN = 64  # number of positions in the picture of the biases


@dataclass(frozen=True)
class Settings:
    """The settings other than the tokens."""

    width: int = 512  # D
    heads: int = 8  # H
    positions: str = "sinusoidal"  # or learned: the encoding that is added to the embeddings
    table_length: int = TABLE_LENGTH  # number of positions in the learned table
    seed: int = 0  # of the random weights


@dataclass(frozen=True)
class Pair:
    """The query of the first token and the key of the last token, at two positions, in every head."""

    q_position: int
    k_position: int
    q: Float[np.ndarray, "H d"]  # rotated
    k: Float[np.ndarray, "H d"]
    product: Float[np.ndarray, "H"]  # q · k
    added: Float[np.ndarray, "H"] | None  # q · k with positions added to the embeddings; None beyond a learned table
    turned_early: Float[np.ndarray, "H"]  # q · k if the embeddings were rotated before the projections


@dataclass(frozen=True)
class Attended:
    """The attention of the last token to all tokens, in head 1."""

    logits: Float[np.ndarray, "T"]  # q · k / sqrt(d)
    weights: Float[np.ndarray, "T"]  # their softmax
    output: Float[np.ndarray, "d"]  # the sum of the values, times the weights


@dataclass(frozen=True)
class Trace:
    """The arrays of all steps, in order."""

    tokens: Tokens
    settings: Settings
    one_hot: Float[np.ndarray, "T V"]
    embedding: Float[np.ndarray, "V D"]
    looked_up: Float[np.ndarray, "T D"]  # one_hot @ embedding
    embedded: Float[np.ndarray, "T D"]  # times sqrt(D)
    sinusoidal: Float[np.ndarray, "T D"]
    positional: Float[np.ndarray, "T D"]  # the encoding that is added: sinusoidal, or rows of the learned table
    added: Float[np.ndarray, "T D"]  # embedded + positional
    q: Float[np.ndarray, "T H d"]  # q and k are projections of `embedded`: with RoPE, nothing is added
    k: Float[np.ndarray, "T H d"]
    v: Float[np.ndarray, "T H d"]
    theta: Float[np.ndarray, "half"]  # RoPE's angle per token, of each pair of channels
    pair: Pair
    shifted: Pair
    turned: tuple[Attended, Attended]  # with RoPE, at positions 0 .. T - 1 and `SHIFT` tokens further
    summed: tuple[Attended | None, ...]  # the same with positions added; None beyond a learned table
    trained: Trained | None = None

    @property
    def head_dim(self) -> int:
        return self.q.shape[-1]


def follow(tokens: Tokens, settings: Settings | None = None) -> Trace:
    """Compute every step for these tokens. Raises ConfigError."""
    settings = settings or Settings()
    check(settings, tokens)
    T, D, H = len(tokens.ids), settings.width, settings.heads
    rng = np.random.default_rng(settings.seed)
    shapes = (tokens.vocab_size, D), (D, D), (D, D), (D, D)
    embedding, *kernels = (rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(D)) for shape in shapes)
    rows = one_hot(tokens)
    looked_up = rows @ embedding
    embedded = looked_up * np.float32(math.sqrt(D))
    rope, absolute = build("rope", settings, pairing=PAIRING), build(settings.positions, settings)
    sinusoidal, positional = (table(own, np.arange(T), D) for own in (build("sinusoidal", settings), absolute))

    def project(x: Float[np.ndarray, "n D"]) -> list[Float[np.ndarray, "n H d"]]:
        return [split_heads(x @ kernel, H) for kernel in kernels]

    q, k, v = project(embedded)

    def summed(places: Real[np.ndarray, "n"], x: Float[np.ndarray, "n D"]) -> list[Float[np.ndarray, "n H d"]] | None:
        """q, k and v with positions added to the embeddings; None beyond a learned table."""
        inside = absolute.table_length is None or places.max() < absolute.table_length
        return project(x + table(absolute, places, D)) if inside else None

    def pair(shift: int) -> Pair:
        places, ends = np.array([shift, shift + T - 1]), embedded[[0, -1]]
        turned_q, turned_k = rotated(rope, q[0], shift), rotated(rope, k[-1], shift + T - 1)
        added = summed(places, ends)
        early = project(rotated(rope, split_heads(ends, H), places).reshape(2, D))
        product = None if added is None else _products(added[0][0], added[1][1])
        turned_early = _products(early[0][0], early[1][1])
        return Pair(shift, shift + T - 1, turned_q, turned_k, _products(turned_q, turned_k), product, turned_early)

    def turned(shift: int) -> Attended:
        places = shift + np.arange(T)
        return attended(rotated(rope, q, places), rotated(rope, k, places), v)

    added = summed(np.arange(T), embedded), summed(SHIFT + np.arange(T), embedded)
    steps = rows, embedding, looked_up, embedded, sinusoidal, positional, embedded + positional
    both = (turned(0), turned(SHIFT)), tuple(None if x is None else attended(*x) for x in added)
    trace = Trace(tokens, settings, *steps, q, k, v, rates(rope), pair(0), pair(SHIFT), *both)
    _hold(trace, rope)
    return trace


def check(settings: Settings, tokens: Tokens) -> None:
    """Raise ConfigError for settings that no model can have."""
    width, heads = settings.width, settings.heads
    if heads < 1:
        raise ConfigError("--heads", heads, "must be at least 1")
    if width % 2:
        raise ConfigError("--width", width, "must be even, because each pair of channels is a sine and a cosine")
    if width % heads or width // heads % 2:
        allowed = f"must be a multiple of {2 * heads}, so that each of {heads} heads has an even number of channels"
        raise ConfigError("--width", width, allowed)
    if width // heads < MIN_HEAD_DIM:
        allowed = f"must be at least {MIN_HEAD_DIM * heads}, {MIN_HEAD_DIM} for each head"
        raise ConfigError("--width", width, allowed)
    if tokens.vocab_size * width > MAX_WEIGHTS:
        raise ConfigError("--width", width, f"must be at most {MAX_WEIGHTS // tokens.vocab_size} with this vocabulary")
    if not 0 <= settings.seed < 2**32:
        raise ConfigError("--seed", settings.seed, "must be at least 0 and below 2^32")
    if settings.positions == "learned" and settings.table_length < len(tokens.ids):
        allowed = (
            f"must be at least {len(tokens.ids)}, the number of tokens: position {settings.table_length} is beyond "
            "the learned table and has no row"
        )
        raise ConfigError("--table-length", settings.table_length, allowed)


def build(name: str, settings: Settings, **hyperparameters: object) -> Encoding:
    """Build one of the project's encodings for a model with these settings."""
    width, heads = settings.width, settings.heads
    dims = Dims(width, heads, heads, width // heads, settings.table_length)
    return encodings.build(name, dims, nnx.Rngs(settings.seed), **hyperparameters)


def split_heads(x: Float[np.ndarray, "*T D"], heads: int) -> Float[np.ndarray, "*T H d"]:
    return x.reshape(*x.shape[:-1], heads, -1)


def table(absolute: Encoding, positions: Real[np.ndarray, "T"], width: int) -> Float[np.ndarray, "T D"]:
    """The vectors that an absolute encoding adds to the embeddings of tokens at these positions."""
    nothing = jnp.zeros((1, len(positions), width))
    return np.asarray(absolute.embed(nothing, jnp.asarray(positions)[None])[0])


def rotated(
    rope: Encoding, x: Float[np.ndarray, "*T H d"], positions: Real[np.ndarray, "*T"] | float
) -> Float[np.ndarray, "*T H d"]:
    """The queries or keys of tokens at these positions, rotated by RoPE."""
    rows, at = jnp.asarray(x).reshape(1, -1, *x.shape[-2:]), jnp.asarray(positions).reshape(1, -1)
    rotated, _ = rope.rotate(rows, jnp.zeros_like(rows), at, at, (None, None))
    return np.asarray(rotated).reshape(x.shape)


def attended(q: Float[np.ndarray, "T H d"], k: Float[np.ndarray, "T H d"], v: Float[np.ndarray, "T H d"]) -> Attended:
    """The attention of the last query in head 1."""
    logits = k[:, 0] @ q[-1, 0] / math.sqrt(q.shape[-1])
    weights = softmax(logits)
    return Attended(logits, weights, weights @ v[:, 0])


def rates(encoding: Encoding) -> Float[np.ndarray, "half"]:
    """The inverse frequencies of an encoding: radians per token, of each pair of channels."""
    return np.asarray(encoding.inverse_frequencies[...], np.float64)  # pyright: ignore[reportAttributeAccessIssue]


def _products(q: Float[np.ndarray, "H d"], k: Float[np.ndarray, "H d"]) -> Float[np.ndarray, "H"]:
    return np.einsum("hd,hd->h", q, k)


def _hold(trace: Trace, rope: Encoding) -> None:
    """Check that the general statements of the text hold for this sentence. Raises RuntimeError if one does not."""
    first = trace.sinusoidal[0]
    size = np.linalg.norm(trace.q[0], axis=-1) * np.linalg.norm(trace.k[-1], axis=-1)
    held = {
        "one-hot times the embedding matrix is the row of the token": np.array_equal(
            trace.looked_up, trace.embedding[list(trace.tokens.ids)]
        ),
        "row 0 of the sinusoidal table is 0, 1, 0, 1": not first[0::2].any() and bool((first[1::2] == 1).all()),
        "RoPE does not change the embeddings": np.array_equal(
            rope.embed(jnp.asarray(trace.embedded)[None], jnp.arange(len(trace.embedded))[None])[0], trace.embedded
        ),
        "a query at position 0 is not rotated": np.array_equal(trace.pair.q, trace.q[0]),
        "the dot product depends only on the difference of positions": bool(
            (np.abs(trace.pair.product - trace.shifted.product) < 1e-5 * size).all()
        ),
        "with RoPE, weights and output stay the same": all(
            np.allclose(*(getattr(at, name) for at in trace.turned), atol=1e-4) for name in ("weights", "output")
        ),
    }
    if not all(held.values()):
        raise RuntimeError("this does not hold: " + "; ".join(claim for claim, so in held.items() if not so))
