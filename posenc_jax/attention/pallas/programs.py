"""The bodies of the attention kernels: the logits of a block, and from them the output or a gradient.

A program instance works on one head of one sequence. On a GPU, its arguments are references to arrays in global memory.
It reads one block of tokens at a time into on-chip memory. On a TPU, its arguments are references to single blocks that
have already been copied to on-chip memory; see `tpu_kernel`.
"""

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Real

from posenc_jax.attention.blockwise import no_keys, with_keys
from posenc_jax.encodings.base import AttentionMask, Context, DistanceBias, Encoding, Pairwise, overrides

LOWEST = float(jnp.finfo(jnp.float32).min)


class Plan(NamedTuple):
    """The static parameters that a kernel is compiled for."""

    function: Callable[..., Array] | None  # `function` and `unit` are those of `Pairwise`
    unit: Callable[..., Array] | None
    attention_mask: AttentionMask
    offset: int  # query 0 is aligned with key `offset`
    keys: int  # number of keys; later ones are padding of the last block
    scale: float
    block: int

    def diagonals(self, queries: int) -> range:
        """Index of the query block minus index of the key block, for pairs in which a query may attend to a key."""
        last = queries // self.block - 1
        if self.attention_mask.window is not None:
            last = min(last, (self.attention_mask.window - 1 - self.offset + self.block - 1) // self.block)
        return range(-((self.offset + self.block - 1) // self.block), last + 1)

    def visible_keys(self, i: Any, blocks: int) -> tuple[Any, Any]:
        """The range [first, stop) of the key blocks (of `blocks` in total) that query block i may attend to."""
        b, window = self.block, self.attention_mask.window
        first_query = self.offset + i * b  # in key indices
        first = lax.div(jnp.maximum(first_query - window + 1, 0), b) if window else 0
        return first, jnp.minimum(lax.div(first_query + b - 1, b) + 1, blocks) if self.attention_mask.causal else blocks

    def visible_queries(self, j: Any, blocks: int) -> tuple[Any, Any]:
        """The range [first, stop) of the query blocks (of `blocks` in total) that may attend to key block j."""
        b, window = self.block, self.attention_mask.window
        first_key = j * b - self.offset  # in query indices
        first = lax.div(jnp.maximum(first_key, 0), b) if self.attention_mask.causal else 0
        if not window:
            return first, blocks
        return first, jnp.minimum(lax.div(jnp.maximum(first_key + b - 1 + window - 1 + b, 0), b), blocks)


class Inputs(NamedTuple):
    """Arrays. Inside a kernel: references to the parts of the arrays that belong to one head of one sequence."""

    q: Any  # [B, T, H, d]
    k: Any  # [B, S, K, d]
    v: Any  # [B, S, K, e]
    query: tuple[Any, ...]  # `query` of `Pairwise`, each [B, H, T]
    key: tuple[Any, ...]  # `key` of `Pairwise`, each [B, H, S]
    numbers: tuple[Any, ...]  # `numbers` of `Pairwise`, each [H, n]
    vector: Any  # the bias at each distance [H, n], or None
    q_pos: Any  # [#B, T]
    k_pos: Any  # [#B, S]


def computes(encoding: Encoding, attention_mask: AttentionMask) -> bool:
    """Whether the kernels support an encoding. This depends on the hooks that it overrides, never on its name."""
    if overrides(encoding, "scores", "weights", "values"):
        return False
    if isinstance(encoding, DistanceBias):
        return attention_mask.contiguous and attention_mask.causal
    return not overrides(encoding, "bias") or overrides(encoding, "pairwise")


def plan_and_inputs(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    q_pos: Real[Array, "#B T"],
    k_pos: Real[Array, "#B S"],
    ctx: Context,
    attention_mask: AttentionMask,
    block: int,
) -> tuple[Plan, Inputs]:
    """The static parameters and the arrays of a kernel. The caller sets `vector`, the bias at each distance.

    Tokens are padded to whole blocks with copies of the last token.
    """
    (T, H, d), (S, K) = q.shape[1:], k.shape[1:3]
    form = None
    if not isinstance(encoding, DistanceBias):
        form = encoding.pairwise(q, jnp.repeat(k, H // K, axis=2), q_pos, k_pos, ctx)
    function, query, key, unit, numbers = form or Pairwise(None)  # type: ignore[arg-type]
    fill = functools.partial(_fill, block=block)
    inputs = Inputs(
        q=fill(q, axis=1),
        k=fill(k, axis=1),
        v=fill(v, axis=1),
        query=tuple(fill(_of_each_head(x, q), axis=2) for x in query),
        key=tuple(fill(_of_each_head(x, q), axis=2) for x in key),
        numbers=tuple(jnp.broadcast_to(x, (H, x.shape[1])).astype(jnp.float32) for x in numbers),
        vector=None,
        q_pos=fill(q_pos.astype(jnp.float32), axis=1),
        k_pos=fill(k_pos.astype(jnp.float32), axis=1),
    )
    return Plan(function, unit, attention_mask, S - T, S, 1 / math.sqrt(d), block), inputs


def _fill(x: Array, axis: int, block: int) -> Array:
    padding = [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, padding, mode="edge") if padding[axis][1] else x


def _of_each_head(x: Float[Array, "#B N #H"], q: Float[Array, "B T H d"]) -> Float[Array, "B H N"]:
    return jnp.broadcast_to(jnp.moveaxis(x, 2, 1), (q.shape[0], q.shape[2], x.shape[1])).astype(jnp.float32)


class Tokens(NamedTuple):
    """A block of queries or keys, laid out along one axis of a block of logits."""

    index: Array  # in key indices
    position: Array
    terms: tuple[Array, ...]


@dataclass(frozen=True)
class Program:
    """The computations that all kernels share. They work with either axis order of a block of logits."""

    plan: Plan
    inputs: Inputs

    def block(self, x: Any, i: Any) -> Array:
        return x[pl.ds(i * self.plan.block, self.plan.block)]

    def queries(self, i: Any, axis: int) -> Tokens:
        return self._tokens(i, axis, self.plan.offset, self.inputs.q_pos, self.inputs.query)

    def keys(self, j: Any, axis: int) -> Tokens:
        return self._tokens(j, axis, 0, self.inputs.k_pos, self.inputs.key)

    def _tokens(self, i: Any, axis: int, offset: int, positions: Any, terms: tuple[Any, ...]) -> Tokens:
        index = offset + i * self.plan.block + jnp.arange(self.plan.block)
        tokens = Tokens(index, self.block(positions, i), tuple(self.block(x, i) for x in terms))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 1 - axis), tokens)

    def feature(self, queries: Tokens, keys: Tokens) -> Array | None:
        """The value of `Pairwise.function` for a block, or None if there is no function."""
        function = self.plan.function
        if function is None:
            return None
        return function(queries.terms, keys.terms, queries.position, keys.position)

    def bias(self, feature: Array | None) -> Array | None:
        unit = self.plan.unit
        if unit is None or feature is None:
            return feature

        def add_unit(n, total):
            return total + unit(feature, *(x[n] for x in self.inputs.numbers))

        return lax.fori_loop(0, self.inputs.numbers[0].shape[0], add_unit, jnp.zeros_like(feature))

    def bias_gradient(
        self, feature: Array | None, d_bias: Array, d_numbers: tuple[Array, ...]
    ) -> tuple[Array, tuple[Array, ...]]:
        """The gradient of `feature`, and `d_numbers` plus this block's gradient of the units' numbers.

        If `d_numbers` is empty, the gradient of the numbers is not computed.
        """
        unit = self.plan.unit
        if unit is None:
            return d_bias, d_numbers

        def add_unit(n, totals):
            d_feature, d_numbers = totals
            part, *of_unit = jax.vjp(unit, feature, *(x[n] for x in self.inputs.numbers))[1](d_bias)
            d_numbers = (
                jnp.where(jnp.arange(len(total)) == n, total + x, total)
                for total, x in zip(d_numbers, of_unit, strict=bool(d_numbers))
            )
            return d_feature + part, tuple(d_numbers)

        start = jnp.zeros_like(d_bias), d_numbers
        return lax.fori_loop(0, self.inputs.numbers[0].shape[0], add_unit, start)

    def logits(self, products: Array, bias: Array | None, queries: Tokens, keys: Tokens) -> Array:
        distance = queries.index - keys.index
        logits = products * self.plan.scale
        if bias is not None:
            logits += bias
        if self.inputs.vector is not None:
            logits += self.by_distance(distance)
        mask = self.plan.attention_mask.allows(distance)
        if not self.plan.attention_mask.causal:  # a causal mask already hides the padding keys from every real query
            mask &= keys.index < self.plan.keys
        return jnp.where(mask, logits, LOWEST)

    def by_distance(self, distance: Array) -> Array:
        vector = self.inputs.vector
        return vector[jnp.clip(distance, 0, vector.shape[0] - 1)]


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def output(program: Program, out: Any, log_normalizer: Any) -> None:
    i, inputs, b = pl.program_id(0), program.inputs, program.plan.block
    q, queries = program.block(inputs.q, i), program.queries(i, axis=0)

    def add_block(j, sums):
        k, v, keys = program.block(inputs.k, j), program.block(inputs.v, j), program.keys(j, axis=1)
        z = program.logits(_product(q, k.T), program.bias(program.feature(queries, keys)), queries, keys)
        return with_keys(sums, z, lambda weights: _product(weights.astype(v.dtype), v))

    first, stop = program.plan.visible_keys(i, inputs.k.shape[0] // program.plan.block)
    total, normalizer, maximum = lax.fori_loop(first, stop, add_block, no_keys((b,), inputs.v.shape[1]))
    out[...] = (total / normalizer[:, None]).astype(out.dtype)
    log_normalizer[...] = maximum + jnp.log(normalizer)


def gradient_of_queries(program, grad, log_normalizer, delta, d_q, d_query, d_numbers):
    i, inputs = pl.program_id(0), program.inputs
    q, grad, queries = program.block(inputs.q, i), program.block(grad, i), program.queries(i, axis=0)
    log_normalizer, delta = (program.block(x, i)[:, None] for x in (log_normalizer, delta))

    def add_block(j, totals):
        of_q, of_terms, of_numbers = totals
        k, v, keys = program.block(inputs.k, j), program.block(inputs.v, j), program.keys(j, axis=1)
        feature, pull_back = jax.vjp(lambda terms: program.feature(queries._replace(terms=terms), keys), queries.terms)
        z = program.logits(_product(q, k.T), program.bias(feature), queries, keys)
        d_z = jnp.exp(z - log_normalizer) * (_product(grad, v.T) - delta)
        of_q += _product(d_z.astype(k.dtype), k)
        if feature is not None:
            d_feature, of_numbers = program.bias_gradient(feature, d_z, of_numbers)
            of_terms = tuple(map(operator.add, of_terms, *pull_back(d_feature)))
        return of_q, of_terms, of_numbers

    first, stop = program.plan.visible_keys(i, inputs.k.shape[0] // program.plan.block)
    of_q, of_terms, of_numbers = lax.fori_loop(first, stop, add_block, _zeros((q, queries.terms, d_numbers)))
    d_q[...] = (of_q * program.plan.scale).astype(d_q.dtype)
    for ref, x in zip(d_query, of_terms, strict=True):
        ref[...] = x.squeeze(axis=1)
    for ref, x in zip(d_numbers, of_numbers, strict=True):
        ref[...] = x


def gradient_of_keys(program, grad, log_normalizer, delta, d_k, d_v, d_key):
    j, inputs = pl.program_id(0), program.inputs
    k, v, keys = program.block(inputs.k, j), program.block(inputs.v, j), program.keys(j, axis=0)

    def add_block(i, totals):
        of_k, of_v, of_terms = totals
        q, own_grad, queries = program.block(inputs.q, i), program.block(grad, i), program.queries(i, axis=1)
        feature, pull_back = jax.vjp(lambda terms: program.feature(queries, keys._replace(terms=terms)), keys.terms)
        z = program.logits(_product(k, q.T), program.bias(feature), queries, keys)
        weights = jnp.exp(z - program.block(log_normalizer, i)[None, :])
        d_z = weights * (_product(v, own_grad.T) - program.block(delta, i)[None, :])
        of_k += _product(d_z.astype(q.dtype), q)
        of_v += _product(weights.astype(own_grad.dtype), own_grad)
        if of_terms:
            d_feature, _ = program.bias_gradient(feature, d_z, ())
            of_terms = tuple(map(operator.add, of_terms, *pull_back(d_feature)))
        return of_k, of_v, of_terms

    first, stop = program.plan.visible_queries(j, inputs.q.shape[0] // program.plan.block)
    of_k, of_v, of_terms = lax.fori_loop(first, stop, add_block, _zeros((k, v, keys.terms)))
    d_k[...] = (of_k * program.plan.scale).astype(d_k.dtype)
    d_v[...] = of_v.astype(d_v.dtype)
    for ref, x in zip(d_key, of_terms, strict=True):
        ref[...] = x.squeeze(axis=1)


def gradient_of_distances(program, grad, log_normalizer, delta, d_blocks):
    """Sum the blocks of one diagonal. The same entry of each block belongs to the same distance."""
    inputs, b = program.inputs, program.plan.block
    diagonal = pl.program_id(0) + program.plan.diagonals(inputs.q.shape[0])[0]
    n, m = inputs.q.shape[0] // b, inputs.k.shape[0] // b

    def add_block(i, total):
        j = i - diagonal
        q, k, v, own_grad = (program.block(x, at) for x, at in ((inputs.q, i), (inputs.k, j), (inputs.v, j), (grad, i)))
        z = program.logits(_product(q, k.T), None, program.queries(i, axis=0), program.keys(j, axis=1))
        worth = _product(own_grad, v.T) - program.block(delta, i)[:, None]
        return total + jnp.exp(z - program.block(log_normalizer, i)[:, None]) * worth

    first, stop = jnp.maximum(diagonal, 0), jnp.minimum(diagonal + m, n)
    d_blocks[...] = lax.fori_loop(first, stop, add_block, jnp.zeros((b, b), jnp.float32))
