"""What the attention kernels of GPUs and TPUs share: their arguments, and the logits of a block with their gradients.

A program instance works on one head of one sequence. On a GPU, its arguments are references to arrays in global memory.
It reads one block of tokens at a time into on-chip memory. On a TPU, its arguments are references to single blocks that
have already been copied to on-chip memory; see `tpu_kernel`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from posenc_jax.encodings.base import AttentionInputs, AttentionMask, DistanceBias, Encoding, Pairwise, overrides

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
    interpret: bool  # emulate the kernel with JAX operations, on any device

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


class Operands(NamedTuple):
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


def plan_and_operands(
    encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask, block: int, interpret: bool
) -> tuple[Plan, Operands]:
    """The static parameters and the arrays of a kernel. The caller sets `vector`, the bias at each distance.

    Tokens are padded to whole blocks with copies of the last token.
    """
    q, k, v, q_pos, k_pos, ctx, *_ = inputs
    (T, H, d), (S, K) = q.shape[1:], k.shape[1:3]
    form = None
    if not isinstance(encoding, DistanceBias):
        form = encoding.pairwise(q, jnp.repeat(k, H // K, axis=2), q_pos, k_pos, ctx)
    function, query, key, unit, numbers = form or Pairwise(None)  # type: ignore[arg-type]

    def fill(x, axis=1):
        padding = [(0, -n % block if i == axis else 0) for i, n in enumerate(x.shape)]
        return jnp.pad(x, padding, mode="edge") if padding[axis][1] else x

    def fill_heads(x):
        x = jnp.broadcast_to(jnp.moveaxis(x, 2, 1), (q.shape[0], H, x.shape[1])).astype(jnp.float32)
        return fill(x, axis=2)

    operands = Operands(
        q=fill(q),
        k=fill(k),
        v=fill(v),
        query=tuple(map(fill_heads, query)),
        key=tuple(map(fill_heads, key)),
        numbers=tuple(jnp.broadcast_to(x, (H, x.shape[1])).astype(jnp.float32) for x in numbers),
        vector=None,
        q_pos=fill(q_pos.astype(jnp.float32)),
        k_pos=fill(k_pos.astype(jnp.float32)),
    )
    return Plan(function, unit, attention_mask, S - T, S, 1 / math.sqrt(d), block, interpret), operands


def block_specs(axes: Any, arrays: Any, *, sizes, counts, place, memory=lambda axes: None) -> Any:
    """Which part of each array a program instance gets, by the names of the array's axes, one letter each.

    `sizes` has the block size of each axis that is divided (None: one entry, and the instance does not see the axis),
    and `place(*indices)` the index of the instance's block on it. Along "B" and "H", an array may have fewer entries
    than `counts`, which neighbouring sequences or heads share. `memory(axes)` is the kind of memory for an array.
    """

    def spec(axes, x):
        named = dict(zip(axes, x.shape, strict=True))

        def index(*indices):
            own = place(*indices)
            return tuple(own.get(axis, 0) // (counts.get(axis, n) // n) for axis, n in named.items())

        return pl.BlockSpec(tuple(sizes.get(axis, n) for axis, n in named.items()), index, memory_space=memory(axes))

    return jax.tree.map(lambda axes, part: jax.tree.map(lambda x: spec(axes, x), part), axes, arrays)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class Tokens(NamedTuple):
    """A block of queries or keys, laid out along one axis of a block of logits."""

    index: Array  # in key indices
    position: Array
    terms: tuple[Array, ...]


@dataclass(frozen=True)
class Program:
    """The computations that all kernels share. They work with either axis order of a block of logits."""

    plan: Plan
    operands: Operands

    def block(self, x: Any, i: Any) -> Array:
        return x[pl.ds(i * self.plan.block, self.plan.block)]

    def queries(self, i: Any, axis: int) -> Tokens:
        return self._tokens(i, axis, self.plan.offset, self.operands.q_pos, self.operands.query)

    def keys(self, j: Any, axis: int) -> Tokens:
        return self._tokens(j, axis, 0, self.operands.k_pos, self.operands.key)

    def _tokens(self, i: Any, axis: int, offset: int, positions: Any, terms: tuple[Any, ...]) -> Tokens:
        index = offset + i * self.plan.block + jnp.arange(self.plan.block)
        tokens = Tokens(index, self.block(positions, i), tuple(self.block(x, i) for x in terms))
        return jax.tree.map(lambda x: jnp.expand_dims(x, 1 - axis), tokens)

    def feature(self, queries: Tokens, keys: Tokens) -> Array | None:
        """The value of `Pairwise.function` for a block, or None if there is no function."""
        function, terms = self.plan.function, (queries.terms, keys.terms)
        return None if function is None else function(*terms, queries.position, keys.position)

    def bias(self, feature: Array | None) -> Array | None:
        unit = self.plan.unit
        if unit is None or feature is None:
            return feature

        def add_unit(n, total):
            return total + unit(feature, *(x[n] for x in self.operands.numbers))

        return lax.fori_loop(0, self.operands.numbers[0].shape[0], add_unit, jnp.zeros_like(feature))

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
            part, *of_unit = jax.vjp(unit, feature, *(x[n] for x in self.operands.numbers))[1](d_bias)
            d_numbers = (
                jnp.where(jnp.arange(len(total)) == n, total + x, total)
                for total, x in zip(d_numbers, of_unit, strict=bool(d_numbers))
            )
            return d_feature + part, tuple(d_numbers)

        start = jnp.zeros_like(d_bias), d_numbers
        return lax.fori_loop(0, self.operands.numbers[0].shape[0], add_unit, start)

    def logits(self, products: Array, bias: Array | None, queries: Tokens, keys: Tokens) -> Array:
        distance = queries.index - keys.index
        logits = products * self.plan.scale
        if bias is not None:
            logits += bias
        if self.operands.vector is not None:
            logits += self.by_distance(distance)
        mask = self.plan.attention_mask.allows(distance)
        if not self.plan.attention_mask.causal:  # a causal mask already hides the padding keys from every real query
            mask &= keys.index < self.plan.keys
        return jnp.where(mask, logits, LOWEST)

    def by_distance(self, distance: Array) -> Array:
        vector = self.operands.vector
        return vector[jnp.clip(distance, 0, vector.shape[0] - 1)]
