"""Encodings in which the tokens between key and query decide what remains of the key: by gates, or by reflections."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from posenc_jax.documents import shifted, sum_within
from posenc_jax.encodings.base import Constant, Dims, DistanceBias, Encoding, Pairwise, full_float32
from posenc_jax.schema import ConfigError, Count, Positive, Range


class FoX(Encoding):
    r"""Forgetting attention: each token's gate scales down the attention of later tokens to earlier ones.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + \sum_{l=j+1}^{i} \ln f_l, \quad f_t = \sigma(w_h \cdot x_t + b_h)

    A constant gate f is ALiBi with slope -ln f. The sum is a difference of float32 cumulative sums. Learned, one set
    per layer: w [D, H], initially LeCun normal, and b [H], initially `bias_init`. Data dependent. Source: Lin et al.
    2025, without its "Pro" block, which is another architecture.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        bias_init: float = 0.0  # b; the gate of a new model is sigmoid(b)

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        bias_init = nnx.initializers.constant(config.bias_init)
        self.gate = nnx.Linear(dims.d_model, dims.num_heads, bias_init=bias_init, rngs=rngs)

    def extend(self, x, positions, state, documents=None):
        total = running_sum(log_gates(self.gate, x), state, documents)
        return (total, total), total[:, -1:]

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return between(*ctx)

    def pairwise(self, q, k, q_pos, k_pos, ctx):
        return Pairwise(lambda query, key, i, j: query[0] - key[0], (ctx[0],), (ctx[1],))


class FoXFixed(DistanceBias):
    r"""Forgetting attention with one constant gate per head, which does not depend on the data.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d} + (i - j) \ln \sigma(b_h), \quad b_h = -\ln(e^{1/T_h} - 1)

    so that attention of head h decays by 1/e in T_h tokens: ALiBi with slopes 1/T_h. The logarithms of the times are
    spaced evenly over the heads, from `shortest` to `longest`. By default nothing is learned. If `learned`, b [H] is
    learned in each layer, from these initial values. Source: Lin et al. 2025, the data-independent and fixed gates of
    its ablations. Differs from the reference: it has no default times (those here are ours), and its learned form can
    also start at b = 0. Its form without a gate is the encoding "none".
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        shortest: Positive = 2.0  # T of the first head, in tokens
        longest: Positive = 1024.0  # T of the last head, in tokens
        learned: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        if config.longest < config.shortest:
            raise ConfigError("encoding.longest", config.longest, f"must be at least shortest = {config.shortest:g}")
        times = np.geomspace(config.shortest, config.longest, dims.num_heads)
        logits = jnp.asarray(-np.log(np.expm1(1 / times)), jnp.float32)  # [H]
        self.gate = nnx.Param(logits) if config.learned else Constant(logits)

    def distance_bias(self, distance):
        return jnp.multiply.outer(jax.nn.log_sigmoid(self.gate[...]), distance.astype(jnp.float32))


class Wall(Encoding):
    r"""Wall attention: each channel of each head decays at its own rate, which the tokens in between set.

    .. math:: z_{ij} = \sum_c q_{ic}\, k_{jc}\, e^{P_{ic} - P_{jc}} / \sqrt{d},
        \quad P_{tc} = \sum_{l \le t} \ln \sigma(w_c \cdot x_l + b_c)

    Computed in float32, without overflow at any length: for a block of queries the exponent is split at the block's
    first token, so that no factor exceeds 1 for earlier keys. Keys inside the block are computed pair by pair. One gate
    per channel of each query head. Learned, one set per layer: w [D, H d], initially LeCun normal, and b, initially
    `bias_init`. If `forget_gate`, each head also has FoX's gate, with the same initial b. Data dependent. Source: fla's
    layer `WallAttention` (Tilde Research, 2026).
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        bias_init: float = 8.0  # b; the gates of a new model are sigmoid(b)
        forget_gate: bool = False

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        bias_init = nnx.initializers.constant(config.bias_init)
        width = dims.num_heads * dims.head_dim
        self.heads, self.forget_gate = dims.num_heads, config.forget_gate
        self.channels = nnx.Linear(dims.d_model, width, bias_init=bias_init, rngs=rngs)
        if config.forget_gate:
            self.gate = nnx.Linear(dims.d_model, dims.num_heads, bias_init=bias_init, rngs=rngs)

    def extend(self, x, positions, state, documents=None):
        total, scalar = (None, None) if state is None else state
        total = running_sum(log_gates(self.channels, x).reshape(*x.shape[:2], self.heads, -1), total, documents)
        scalar = running_sum(log_gates(self.gate, x), scalar, documents) if self.forget_gate else None
        own = total, scalar, documents
        return (own, own), jax.tree.map(lambda x: x[:, -1:], (total, scalar))

    def scores(self, q, k, ctx):
        (q_total, _, q_doc), (k_total, _, k_doc) = ctx
        return _faded(q, k, q_total, k_total, q_doc, k_doc) / math.sqrt(q.shape[-1])

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return between(ctx[0][1], ctx[1][1]) if self.forget_gate else None


class PaTH(Encoding):
    r"""PaTH attention: each token between key and query applies a partial reflection along its own direction.

    .. math:: z_{ij} = q_i^T H_i H_{i-1} \cdots H_{j+1} k_j / \sqrt{d}, \quad H_t = I - \beta_t w_t w_t^T,
        \quad \beta_t = 2\,\sigma(b \cdot x_t + c), \quad w_t = \mathrm{unit}(\mathrm{silu}(\mathrm{conv}(W x)_t))

    With tokens as the rows of W, Q and K, z = QK' - tril(QW') diag(beta) (I + stril(WW') diag(beta))^-1 stril(WK'),
    which is a triangular solve in float32. Each head of keys has one w and beta. Learned, one set per layer: W of rank
    `rank` and b, initially LeCun normal; c, initially 0; and a depthwise causal convolution over `conv_width` tokens,
    initially uniform within 1/sqrt(conv_width). `forget_gate` = "added" adds FoX's sum of log gates to z, as FoX does.
    "scaled" adds it to q^T H .. H k, before the division by sqrt(d), as fla does in training and decoding. Data
    dependent. Source: Yang et al. 2025, whose equations have no 1/sqrt(d) for the logits or the gates.
    """

    shared = False

    @dataclass(frozen=True)
    class Config:
        rank: Count = 32  # of the projection to w
        conv_width: Annotated[int, Range(at_least=1, at_most=256)] = 3  # tokens
        forget_gate: Literal["none", "added", "scaled"] = "none"

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        inner = dims.num_kv_heads * dims.head_dim
        self.heads, self.forget_gate = dims.num_kv_heads, config.forget_gate
        self.down = nnx.Linear(dims.d_model, config.rank, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(config.rank, inner, use_bias=False, rngs=rngs)
        limit = 1 / math.sqrt(config.conv_width)
        shape = (config.conv_width, inner)
        self.conv = nnx.Param(jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit))
        self.beta = nnx.Linear(dims.d_model, dims.num_kv_heads, rngs=rngs)
        if config.forget_gate != "none":
            self.gate = nnx.Linear(dims.d_model, dims.num_heads, rngs=rngs)

    def extend(self, x, positions, state, documents=None):
        earlier, total = (None, None) if state is None else state
        batch, length, width = x.shape
        flat = x.reshape(-1, width).astype(jnp.float32)
        w = self.up(self.down(flat)).reshape(batch, length, -1)
        w, earlier = causal_convolution(w, self.conv[...], earlier, documents)
        w = jax.nn.silu(w).reshape(batch, length, self.heads, -1)
        w = w * lax.rsqrt((w**2).sum(axis=-1, keepdims=True) + 1e-6)
        beta = 2 * jax.nn.sigmoid(self.beta(flat)).reshape(batch, length, -1)  # [B, T, K]
        total = None if self.forget_gate == "none" else running_sum(log_gates(self.gate, x), total, documents)
        return (total, (w, beta, total)), (earlier, None if total is None else total[:, -1:])

    @full_float32
    def scores(self, q, k, ctx):
        w, beta, _ = ctx[1]
        (length, keys), groups = (q.shape[1], k.shape[1]), q.shape[2] // w.shape[2]
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        beta = jnp.moveaxis(beta, 1, 2)[:, :, None, :]  # [B, K, 1, S]
        overlap = jnp.einsum("bthd,bshd->bhts", w, w) * beta
        right = jnp.tril(jnp.einsum("bthd,bshd->bhts", w, k[:, :, ::groups]), -1)
        # Row t, column j: what w_t finds of key j after the tokens in between.
        found = solve_unit_lower(overlap, right)
        w, found = jnp.repeat(w, groups, axis=2), jnp.repeat(beta.swapaxes(2, 3) * found, groups, axis=1)
        passed = jnp.tril(jnp.einsum("bthd,bshd->bhts", q, w), keys - length)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) - passed @ found
        return logits / math.sqrt(q.shape[-1])

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return None if self.forget_gate == "none" else self._forgotten(ctx[0], ctx[1][2], q.shape[-1])

    def update_keys(self, k, ctx):
        w, beta, _ = ctx
        found = (k * w).sum(axis=-1, keepdims=True)
        return k - beta[..., None] * found * w

    def scan_init(self, q):
        return q.astype(jnp.float32).swapaxes(1, 2)

    @full_float32
    def scan_keys(self, k, ctx):
        w, beta, total = ctx
        w, k, beta = w.swapaxes(1, 2), k.astype(jnp.float32).swapaxes(1, 2), jnp.moveaxis(beta, 1, 2)
        right = jnp.concatenate([jnp.tril(w @ k.mT, -1), w], axis=-1)
        found = beta[..., None] * solve_unit_lower(w @ w.mT * beta[..., None, :], right)
        return w, found, total

    @full_float32
    def scan_step(self, carry, q, k, mask, ctx):
        w, found, total = ctx[1]
        groups = q.shape[2] // w.shape[1]
        w, found = (jnp.repeat(x, groups, axis=1) for x in (w, found))
        passed = jnp.where(mask, carry @ w.mT, 0) @ found
        of_keys, of_query = jnp.split(passed, [k.shape[1]], axis=-1)
        logits = (carry @ k.astype(jnp.float32).swapaxes(1, 2).mT - of_keys) / math.sqrt(q.shape[-1])
        if self.forget_gate != "none":
            logits = logits + self._forgotten(ctx[0], total, q.shape[-1])
        return carry - of_query, logits

    def _forgotten(self, q_total: Array, k_total: Array, head_dim: int) -> Float[Array, "B H T S"]:
        total = between(q_total, k_total)
        return total / math.sqrt(head_dim) if self.forget_gate == "scaled" else total


class StickBreaking(Encoding):
    r"""Stick-breaking attention: from the nearest key backwards, each key takes a share of what later keys left over.

    .. math:: A_{ij} = \sigma(z_{ij}) \prod_{j<l<i} (1 - \sigma(z_{il})) \;(j < i), \quad A_{ii} = 1 - \sum_{j<i} A_{ij}

    Logits z are those without an encoding. Products are float32 sums of logarithms. The remainder, which is the product
    over all earlier keys, goes to the query's own token, the last key that it may see. Nothing is learned. Source: Tan
    et al. 2024, with the remainder of the authors' code.
    """

    def weights(self, logits, mask):
        # The query's own key is the one that is visible and has no visible key after it.
        earlier = mask & jnp.pad(mask[..., 1:], [(0, 0)] * (mask.ndim - 1) + [(0, 1)])
        z = jnp.where(earlier, logits.astype(jnp.float32), 0)
        left = jnp.where(earlier, jax.nn.log_sigmoid(-z), 0)
        left = lax.cumsum(left, axis=3, reverse=True)  # by this key and all between it and the query
        between = jnp.pad(left[..., 1:], ((0, 0), (0, 0), (0, 0), (0, 1)))
        share = jnp.where(earlier, jnp.exp(jax.nn.log_sigmoid(z) + between), 0)
        return jnp.where(mask & ~earlier, jnp.exp(left[..., :1]), share)


def log_gates(gate: nnx.Linear, x: Float[Array, "B T D"]) -> Float[Array, "B T n"]:
    """Logarithms of the gates of each token, in float32."""
    batch, length, width = x.shape
    return jax.nn.log_sigmoid(gate(x.reshape(-1, width).astype(jnp.float32))).reshape(batch, length, -1)


def between(q_total: Float[Array, "B T H"], k_total: Float[Array, "B S H"]) -> Float[Array, "B H T S"]:
    """The sum of the log gates after each key up to each query, from cumulative sums."""
    return jnp.moveaxis(q_total, -1, 1)[..., :, None] - jnp.moveaxis(k_total, -1, 1)[..., None, :]


@full_float32
def _faded(
    q: Array, k: Array, q_total: Array, k_total: Array, q_doc: Array | None, k_doc: Array | None, block: int = 16
) -> Float[Array, "B H T S"]:
    """Wall's sum over channels for the last T tokens.

    Values for keys ahead of the query, or of another document, have no meaning. They are finite.
    """
    (B, T, H, _), S = q.shape, k.shape[1]
    block = min(block, T)
    padding = ((0, 0), (0, -T % block), (0, 0), (0, 0))  # as many keys, so that each block finds its own
    q, k, q_total, k_total = (jnp.pad(x.astype(jnp.float32), padding, mode="edge") for x in (q, k, q_total, k_total))
    q_doc, k_doc = (None if x is None else jnp.pad(x, padding[:2], mode="edge") for x in (q_doc, k_doc))
    blocks = jax.tree.map(lambda x: x.reshape(B, -1, block, *x.shape[2:]).swapaxes(0, 1), (q, q_total, q_doc))
    starts = S - T + block * jnp.arange(q.shape[1] // block)
    own = jnp.arange(block)[None, :] <= jnp.arange(block)[:, None]

    @jax.checkpoint
    def rows(arguments):
        start, q, total, own_doc = arguments
        first = total[:, :1]
        earlier = (jnp.arange(k.shape[1]) < start)[:, None, None]
        since_first, seen = total - first, own[..., None, None]
        if own_doc is not None:  # sums of other documents do not go on from these: exponents could be large
            earlier = earlier & (k_doc == own_doc[:, :1])[..., None, None]
            since_first = jnp.where((own_doc == own_doc[:, :1])[..., None, None], since_first, 0)
            seen = seen & (own_doc[:, :, None] == own_doc[:, None, :])[..., None, None]
        fading = jnp.exp(jnp.where(earlier, first - k_total, 0))
        z = jnp.einsum("bthd,bshd->bhts", q * jnp.exp(since_first), k * fading)
        near, near_total = (lax.dynamic_slice_in_dim(x, start, block, axis=1) for x in (k, k_total))
        difference = total[:, :, None] - near_total[:, None, :]
        fading = jnp.exp(jnp.where(seen, difference, 0))  # [B, t, t, H, d]
        near = jnp.einsum("bthd,bshd,btshd->bhts", q, near, fading)
        return lax.dynamic_update_slice_in_dim(z, near, start, axis=3)

    z = jnp.moveaxis(lax.map(rows, (starts, *blocks)), 0, 2)  # [B, H, n, t, S]
    return z.reshape(B, H, -1, z.shape[-1])[:, :, :T, :S]


def running_sum(
    x: Float[Array, "B T *n"],
    before: Float[Array, "B 1 *n"] | None = None,
    documents: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T *n"]:
    """The sum of each token and all earlier ones. `before` is the sum of the tokens before the first one.

    With `documents`, the sums begin anew in each of them.
    """
    if documents is not None:
        return sum_within(x, documents)
    total = jnp.cumsum(x, axis=1)
    return total if before is None else before + total


def causal_convolution(
    x: Float[Array, "B T C"],
    taps: Float[Array, "n C"],
    earlier: Float[Array, "B m C"] | None = None,
    documents: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B m C"]]:
    """Each channel's weighted sum over the last n tokens, and the last m = n - 1 tokens.

    The last tap weighs the current token. `earlier` are the m tokens before x. They are 0 by default, and before the
    first token of each of the `documents`.
    """
    length, m = x.shape[1], len(taps) - 1
    joined = jnp.pad(x, [(0, 0), (m, 0), (0, 0)]) if earlier is None else jnp.concatenate([earlier, x], axis=1)

    def tokens_before(s):
        return joined[:, m - s : m - s + length] if documents is None else shifted(x, documents, s)

    near = jnp.stack([tokens_before(m - i) for i in range(len(taps))])
    return jnp.einsum("nbtc,nc->btc", near, taps), joined[:, length:]


def solve_unit_lower(
    matrix: Float[Array, "*batch S S"], right: Float[Array, "*batch S n"], block: int = 16
) -> Float[Array, "*batch S n"]:
    """Solve (I + L) X = R, where L is the strictly lower part of a matrix, by substitution of blocks of rows.

    It uses only matrix products. A training step of 256 tokens with XLA's own solve on CPU (jaxlib 0.10.2) did not
    return within an hour on two devices, nor within six minutes on one.
    """
    size = right.shape[-2]
    padding = [(0, 0)] * (matrix.ndim - 2)
    matrix = jnp.pad(jnp.tril(matrix, -1), [*padding, (0, -size % block), (0, -size % block)])
    right = jnp.pad(right, [*padding, (0, -size % block), (0, 0)])
    rows = jnp.moveaxis(matrix.reshape(*matrix.shape[:-2], -1, block, matrix.shape[-1]), -3, 0)
    rights = jnp.moveaxis(right.reshape(*right.shape[:-2], -1, block, right.shape[-1]), -3, 0)
    starts = block * jnp.arange(len(rows))
    own = jax.vmap(lambda row, start: lax.dynamic_slice_in_dim(row, start, block, axis=-1))(rows, starts)
    inverse = jnp.broadcast_to(jnp.eye(block), own.shape)
    for i in range(1, block):  # the inverse of every diagonal block, row after row
        inverse = inverse.at[..., i, :i].set(-jnp.einsum("...j,...jk->...k", own[..., i, :i], inverse[..., :i, :i]))

    def substitute(solved, arguments):
        start, row, right, inverse = arguments
        found = inverse @ (right - row @ solved)  # rows from `start` on are still 0
        return lax.dynamic_update_slice_in_dim(solved, found, start, axis=-2), None

    return lax.scan(substitute, jnp.zeros_like(right), (starts, rows, rights, inverse))[0][..., :size, :]
