"""Attention kernels for TPUs. They compute the encoding's bias on the fly, so logits are never written to HBM.

The kernels compute the same results as `kernel` on a GPU, written in Pallas for Mosaic. A TPU runs the grid steps of a
kernel one after another, and copies a block of queries and a block of keys to VMEM for each step. The accumulators stay
in VMEM between the steps. They belong to a block of queries (the output, or the gradient of the queries) or to a block
of keys (the gradients of the keys and values). Blocks that the mask hides from each other are skipped.

In a block of logits, rows are keys and columns are queries. A value per query is then a single row, the best layout on
a TPU, and a sum over keys adds whole vectors. No matmul needs a transposed left operand, because keys and values are
passed in both axis orders.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from posenc_jax.attention.pallas import programs
from posenc_jax.attention.pallas.programs import Operands, Plan, Program, Tokens, block_specs, float32
from posenc_jax.attention.sinks import with_sinks
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, DistanceBias, Encoding, distance_bias_of

LANES = 128  # numbers in a row of a vector register; block lengths are multiples of it
SUBLANES = 8  # rows of a vector register
# The maximum block length in tokens. The key is the largest size in bytes of one token's query or value in one head.
# The lengths are chosen so that no kernel needs more than the 16 MiB of VMEM that it may use.
LONGEST = {512: 512, 2048: 256}


def tpu_kernel(
    encoding: Encoding,
    inputs: AttentionInputs,
    attention_mask: AttentionMask,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H e"]:
    """Compute the same attention as `dense`, for the inputs that `runs` accepts.

    Gradients flow to q, k, v, ctx and the arrays of the encoding. `block` is the number of queries, and of keys, in a
    block. It must be a power of two, and at least LANES, or SUBLANES with `interpret`. The default is `block_length`.
    With `interpret`, the kernels are emulated with JAX operations on any device.
    """
    block = block or block_length(*inputs[:3])
    plan, operands = programs.plan_and_operands(encoding, inputs, attention_mask, block, interpret)
    vector = None
    if isinstance(encoding, DistanceBias):
        # In a block (i, j), the distance from key r to query c is that of the first pair of tokens, plus c - r.
        diagonals = plan.diagonals(operands.q.shape[1])
        starts = plan.offset + block * jnp.arange(diagonals.start - 1, diagonals.stop)
        bias = distance_bias_of(encoding, starts[:, None] + jnp.arange(block))
        vector = jnp.concatenate([bias[:, 1:], bias[:, :-1]], axis=2)[:, :, None]
    operands = Operands(
        q=jnp.moveaxis(operands.q, 1, 3),
        k=jnp.moveaxis(operands.k, 1, 2),
        v=jnp.moveaxis(operands.v, 1, 2),
        query=tuple(x[:, :, None] for x in operands.query),
        key=tuple(x[:, :, None] for x in operands.key),
        numbers=tuple(x[:, None] for x in operands.numbers),
        vector=vector,
        q_pos=operands.q_pos[:, None],
        k_pos=operands.k_pos[:, None],
    )
    found: Any = _attention(plan, operands)
    out, log_normalizer = found
    T = inputs.q.shape[1]
    return with_sinks(jnp.moveaxis(out, 3, 1)[:, :T], log_normalizer[:, :, 0, :T], inputs.sinks)


def runs(encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask) -> bool:
    """Whether the kernels support this encoding, mask, and size of queries and values. They know no documents."""
    narrow = _row_bytes(inputs.q, inputs.v) <= max(LONGEST)
    return inputs.documents is None and programs.computes(encoding, attention_mask) and narrow


def block_length(q: Float[Array, "B T H d"], k: Float[Array, "B S K d"], v: Float[Array, "B S K e"]) -> int:
    """The block length in tokens: the largest one that pads neither length beyond the next multiple of LANES."""
    longest = LONGEST[min(size for size in LONGEST if size >= _row_bytes(q, v))]
    return math.gcd(*(-(-x.shape[1] // LANES) * LANES for x in (q, k)), longest)


def _row_bytes(q: Float[Array, "B T H d"], v: Float[Array, "B S K e"]) -> int:
    return max(q.shape[-1], v.shape[-1]) * v.dtype.itemsize


# Axis names; see `_call`.
OPERANDS = Operands("BHdt", "BHsd", "BHse", "BH1t", "BH1s", "HOn", "HD1u", "B1t", "B1s")  # type: ignore[arg-type]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, operands: Operands) -> tuple[Float[Array, "B H e T"], Float[Array, "B H 1 T"]]:
    """The output, and the logarithm of each query's normalizer."""
    return _forward(plan, operands)[0]


def _forward(plan, operands):
    (B, H, _, T), v = operands.q.shape, operands.v
    row = pltpu.VMEM((1, plan.block), jnp.float32)
    results = float32(B, H, v.shape[3], T), float32(B, H, 1, T)
    out, log_normalizer = _call(
        plan, _output, False, (operands, v.mT), (OPERANDS, "BHes"), results, ("BHet", "BH1t"), [row, row]
    )
    out = out.astype(v.dtype)
    return (out, log_normalizer), (operands, out, log_normalizer)


def _backward(plan, residuals, grads):
    grad, grad_log = grads
    operands, out, log_normalizer = residuals
    (B, H, d, T), (_, K, S, e) = operands.q.shape, operands.v.shape
    # As in FlashAttention: the backward pass of softmax subtracts delta = sum(grad * out) of each query.
    delta = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=2, keepdims=True) - grad_log
    given, axes = (operands, grad, log_normalizer, delta), (OPERANDS, "BHet", "BH1t", "BH1t")

    results = (
        float32(B, H, d, T),
        tuple(float32(B, H, 1, T) for _ in operands.query),
        tuple(float32(B, H, x.shape[2], 1, plan.block) for x in operands.numbers),
        None if operands.vector is None else float32(B, *operands.vector.shape),
    )
    result_axes = "BHdt", "BH1t", "BHn1u", "BHv1u"
    d_q, d_query, d_numbers, d_vector = _call(
        plan, _gradient_of_queries, False, (*given, operands.k.mT), (*axes, "BHds"), results, result_axes
    )

    results = float32(B, H, S, d), float32(B, H, S, e), tuple(float32(B, H, 1, S) for _ in operands.key)
    columns = [pltpu.VMEM((plan.block, 1), jnp.float32) for _ in operands.key]
    d_k, d_v, d_key = _call(plan, _gradient_of_keys, True, given, axes, results, ("BHsd", "BHse", "BH1s"), columns)
    d_k, d_v = (x.reshape(B, K, H // K, S, -1).sum(axis=2).astype(operands.k.dtype) for x in (d_k * plan.scale, d_v))
    d_q = (d_q * plan.scale).astype(operands.q.dtype)
    d_numbers = tuple(x.sum(axis=(0, 4)).mT for x in d_numbers)
    d_vector = None if d_vector is None else d_vector.sum(axis=0)
    return (Operands(d_q, d_k, d_v, d_query, d_key, d_numbers, d_vector, None, None),)


_attention.defvjp(_forward, _backward)


@dataclass(frozen=True)
class _Step(Program):
    """One grid step: query block i with key block j. The references in `operands` point to these blocks.

    The last four fields are decorators that run a function at certain steps.
    """

    i: Any
    j: Any
    diagonal: Any  # the entry of `vector` for this pair of blocks
    first_of_all: Callable[..., Any]  # at the first step of a head
    first: Callable[..., Any]  # at the first step of a sum
    seen: Callable[..., Any]  # at steps whose query block may attend to the key block
    last: Callable[..., Any]  # at the last step of a sum

    def _tokens(self, i: Any, axis: int, offset: int, positions: Any, terms: tuple[Any, ...]) -> Tokens:
        def place(ref):
            return jnp.expand_dims(ref[0], 1) if axis == 0 else ref[...]

        b = self.plan.block
        index = offset + i * b + lax.broadcasted_iota(jnp.int32, (b, 1) if axis == 0 else (1, b), axis)
        return Tokens(index, place(positions), tuple(place(x) for x in terms))

    def tokens(self) -> tuple[Tokens, Tokens]:
        return self.queries(self.i, axis=1), self.keys(self.j, axis=0)

    def by_distance(self, distance: Array) -> Array:
        return _toeplitz(self.operands.vector[...], self.plan.block)

    def block_logits(self, feature: Array | None, queries: Tokens, keys: Tokens) -> Array:
        return self.logits(_product(self.operands.k[...], self.operands.q[...]), self.bias(feature), queries, keys)

    def weights_and_gradient(self, z: Array, grad: Any, log_normalizer: Any, delta: Any) -> tuple[Array, Array]:
        """Attention weights of the logits, and the gradient of the logits."""
        weights = jnp.exp(z - log_normalizer[...])
        return weights, weights * (_product(self.operands.v[...], grad[...]) - delta[...])

    def unit_gradient(self, feature: Array, d_bias: Array, d_numbers: tuple[Any, ...] = ()) -> Array:
        """The gradient of `feature`. If `d_numbers` is given, the gradient of the units' numbers is added to it.

        For each number, a row of partial sums is added. The sum of the row is the gradient of the number.
        """
        unit, numbers = self.plan.unit, self.operands.numbers
        if unit is None:
            return d_bias

        def add_unit(n, total):
            rows = (jnp.full((1, self.plan.block), x[n]) for x in numbers)
            part, *of_unit = jax.vjp(unit, feature, *rows)[1](d_bias)
            for ref, x in zip(d_numbers, of_unit, strict=bool(d_numbers)):
                ref[n] += x
            return total + part

        return lax.fori_loop(0, numbers[0].shape[0], add_unit, jnp.zeros_like(d_bias))


def _output(step, v, out, log_normalizer, normalizer, maximum):
    @step.first
    def start():
        out[...] = jnp.zeros_like(out)
        normalizer[...] = jnp.zeros_like(normalizer)
        maximum[...] = jnp.full_like(maximum, programs.LOWEST)

    @step.seen
    def add_block():
        queries, keys = step.tokens()
        z = step.block_logits(step.feature(queries, keys), queries, keys)
        largest = jnp.maximum(maximum[...], z.max(axis=0, keepdims=True))
        weights, decay = jnp.exp(z - largest), jnp.exp(maximum[...] - largest)
        out[...] = out[...] * decay + _product(v[...], weights.astype(v.dtype))
        normalizer[...] = normalizer[...] * decay + weights.sum(axis=0, keepdims=True)
        maximum[...] = largest

    @step.last
    def finish():
        out[...] /= normalizer[...]
        log_normalizer[...] = maximum[...] + jnp.log(normalizer[...])


def _gradient_of_queries(step, grad, log_normalizer, delta, k, d_q, d_query, d_numbers, d_vector):
    @step.first_of_all
    def start_head():
        _clear((d_numbers, d_vector))

    @step.first
    def start():
        _clear((d_q, d_query))

    @step.seen
    def add_block():
        queries, keys = step.tokens()
        feature, pull_back = jax.vjp(lambda terms: step.feature(queries._replace(terms=terms), keys), queries.terms)
        z = step.block_logits(feature, queries, keys)
        _, d_z = step.weights_and_gradient(z, grad, log_normalizer, delta)
        d_q[...] += _product(k[...], d_z.astype(k.dtype))
        if feature is not None:
            (of_terms,) = pull_back(step.unit_gradient(feature, d_z, d_numbers))
            for ref, x in zip(d_query, of_terms, strict=True):
                ref[...] += x
        if d_vector is not None:
            d_vector[step.diagonal] += _toeplitz_sums(d_z)


def _gradient_of_keys(step, grad, log_normalizer, delta, d_k, d_v, d_key, *columns):
    @step.first
    def start():
        _clear((d_k, d_v, columns))

    @step.seen
    def add_block():
        queries, keys = step.tokens()
        feature, pull_back = jax.vjp(lambda terms: step.feature(queries, keys._replace(terms=terms)), keys.terms)
        z = step.block_logits(feature, queries, keys)
        weights, d_z = step.weights_and_gradient(z, grad, log_normalizer, delta)
        q = step.operands.q
        d_k[...] += _product(d_z.astype(q.dtype), q[...], transposed=True)
        d_v[...] += _product(weights.astype(grad.dtype), grad[...], transposed=True)
        if columns:
            (of_terms,) = pull_back(step.unit_gradient(feature, d_z))
            for ref, x in zip(columns, of_terms, strict=True):
                ref[...] += x

    @step.last
    def finish():
        for ref, column in zip(d_key, columns, strict=True):
            ref[...] = jnp.broadcast_to(column[...], (column.shape[0], LANES)).T[:1]


def _clear(refs: Any) -> None:
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros_like(ref)


def _product(x: Array, y: Array, transposed: bool = False) -> Array:
    """The matrix product x @ y, or x @ y.T if `transposed`, in float32."""
    return lax.dot_general(x, y, (((1,), (int(transposed),)), ((), ())), preferred_element_type=jnp.float32)


def _toeplitz(x: Float[Array, "1 w"], size: int) -> Float[Array, "s t"]:
    """The square Toeplitz matrix whose entry at row r and column c is x[c - r]. Negative indices count from the end."""
    block, width = jnp.broadcast_to(x, (SUBLANES, x.shape[1])), x.shape[1]
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    for shift in (1, 2, 4):
        block = jnp.where(row & shift != 0, pltpu.roll(block, shift, 1), block)
    while (rows := block.shape[0]) < size:
        block = jnp.concatenate([block, pltpu.roll(block, rows, 1)])
    return block[:, :size]


def _toeplitz_sums(block: Float[Array, "s t"]) -> Float[Array, "1 w"]:
    """The gradient of `_toeplitz` with respect to x, given the gradient of the matrix."""
    total, width = jnp.concatenate([block, jnp.zeros_like(block)], axis=1), 2 * block.shape[1]
    while total.shape[0] > SUBLANES:
        rows = total.shape[0] // 2
        total = total[:rows] + pltpu.roll(total[rows:], width - rows, 1)
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 0)
    for shift in (1, 2, 4):
        total = jnp.where(row & shift != 0, pltpu.roll(total, width - shift, 1), total)
    return total.sum(axis=0, keepdims=True)


def _call(plan, kernel, by_keys, given, given_axes, results, result_axes, scratch=()) -> Any:
    """Run a kernel on all pairs of blocks that the mask does not hide from each other.

    The outer loop is over query blocks and the inner one over key blocks; `by_keys` swaps them.

    The axis names of an array (see `programs.block_specs`) say which part of it a step gets: its sequence (B), its head
    (H), its block of queries (t), its block of keys (s), its diagonal (D), the only entry (O), and the whole of any
    other axis.
    """
    (B, H, _, T), S, b = given[0].q.shape, given[0].k.shape[2], plan.block
    n, m, diagonals = T // b, S // b, plan.diagonals(T)
    steps, window = n if by_keys else m, plan.attention_mask.window
    if window:  # a block attends to b + window - 1 tokens, the first at `start` modulo b; count the blocks they span
        start = -plan.offset if by_keys else plan.offset - window + 1
        steps = min(steps, (start % b + b + window - 2) // b + 1)

    def others(own):
        return plan.visible_queries(own, n) if by_keys else plan.visible_keys(own, m)

    def place(own, step):
        """The query block, key block and diagonal of a step. After the last visible block, it is repeated."""
        first, stop = others(own)
        other = jnp.maximum(jnp.minimum(first + step, stop - 1), 0)
        i, j = (other, own) if by_keys else (own, other)
        return i, j, jnp.clip(i - j - diagonals.start, 0, len(diagonals) - 1)

    def blocks(sequence, head, own, step):
        i, j, diagonal = place(own, step)
        return {"B": sequence, "H": head, "t": i, "s": j, "D": diagonal}

    def memory(axes):
        return pltpu.SMEM if axes == OPERANDS.numbers else pltpu.VMEM

    sizes, counts = {**dict.fromkeys("BHDO"), "t": b, "s": b}, {"B": B, "H": H}
    specs = functools.partial(block_specs, sizes=sizes, counts=counts, place=blocks, memory=memory)

    def body(operands, *refs):
        own, step = pl.program_id(2), pl.program_id(3)
        first, stop = others(own)
        when = (own == 0) & (step == 0), step == 0, first + step < stop, step == steps - 1
        kernel(_Step(plan, operands, *place(own, step), *map(pl.when, when)), *refs)

    return pl.pallas_call(
        body,
        grid=(B, H, m if by_keys else n, steps),
        in_specs=specs(given_axes, given),
        out_specs=specs(result_axes, results),
        out_shape=results,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=plan.interpret,
        name=f"attention{kernel.__name__}",
    )(*given)
