"""Attention kernels for GPUs. They compute the encoding's bias on the fly, so logits are never written to memory.

The kernels use the same algorithm as `blockwise`, written in Pallas for Triton. Each program instance owns one of:

- a block of queries of one head, for the output or the gradient of the queries;
- a block of keys of one head, for the gradients of the keys and values;
- a diagonal of blocks, for the gradient of a bias by distance.

It reads the other operands block by block. Each sum is accumulated by a single program instance. There are therefore
no atomic additions, and the same input gives the same bits.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from posenc_jax.attention.blockwise import no_keys, with_keys, zeros
from posenc_jax.attention.pallas import programs
from posenc_jax.attention.pallas.programs import Operands, Plan, Program, block_specs, float32
from posenc_jax.attention.sinks import with_sinks
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, DistanceBias, Encoding, distance_bias_of


class Tiling(NamedTuple):
    block: int  # number of queries, and of keys, in a block
    warps: int
    stages: int


# The key is the largest size in bytes of one token's query, key or value in one head. The tilings are chosen so that no
# compiled kernel needs more than 99 KiB of shared memory, which every GPU since Ampere offers to a thread block.
TILINGS = {128: Tiling(64, warps=4, stages=2), 256: Tiling(64, warps=8, stages=1), 512: Tiling(32, warps=4, stages=2)}


def kernel(
    encoding: Encoding,
    inputs: AttentionInputs,
    attention_mask: AttentionMask,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H e"]:
    """Compute the same attention as `dense`, for the inputs that `runs` accepts.

    Gradients flow to q, k, v, ctx and the arrays of the encoding. `block` is the number of queries, and of keys, in a
    block; the default is in `TILINGS`. With `interpret`, the kernels are emulated with JAX operations on any device.
    """
    q, k, v, *_ = inputs
    block = block or _tiling(q, v).block
    plan, operands = programs.plan_and_operands(encoding, inputs, attention_mask, block, interpret)
    operands = operands._replace(q=_widen(operands.q), k=_widen(operands.k), v=_widen(operands.v))
    if isinstance(encoding, DistanceBias):
        operands = operands._replace(vector=distance_bias_of(encoding, jnp.arange(k.shape[1])))
    found: Any = _attention(plan, operands)
    out, log_normalizer = found
    T = q.shape[1]
    return with_sinks(out[:, :T, :, : v.shape[-1]], log_normalizer[..., :T], inputs.sinks)


def runs(encoding: Encoding, inputs: AttentionInputs, attention_mask: AttentionMask) -> bool:
    """Whether the kernels support this encoding, mask, and size of queries and values. They know no documents."""
    narrow = _row_bytes(inputs.q, inputs.v) <= max(TILINGS)
    return inputs.documents is None and programs.computes(encoding, attention_mask) and narrow


def _tiling(q: Float[Array, "B T H d"], v: Float[Array, "B S K e"]) -> Tiling:
    return TILINGS[min(size for size in TILINGS if size >= _row_bytes(q, v))]


def _width(x: Float[Array, "B T H d"]) -> int:
    """The head dimension inside the kernels: a power of two, and at least 16, the minimum for Triton's `dot`."""
    return max(16, pl.next_power_of_2(x.shape[-1]))


def _row_bytes(q: Float[Array, "B T H d"], v: Float[Array, "B S K e"]) -> int:
    return max(_width(q), _width(v)) * v.dtype.itemsize


def _widen(x: Float[Array, "B T H d"]) -> Float[Array, "B T H w"]:
    """Pad the channels with zeros to `_width`."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, _width(x) - x.shape[-1])])


# Axis names; see `_call`.
OPERANDS = Operands("BTHd", "BTHd", "BTHd", "BHT", "BHT", "Hn", "Hn", "BT", "BT")  # type: ignore[arg-type]
BACKWARD = OPERANDS, "BTHd", "BHT", "BHT"  # the operands, the gradient of the output, log_normalizer and delta


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, operands: Operands) -> tuple[Float[Array, "B T H e"], Float[Array, "B H T"]]:
    """The output, and the logarithm of each query's normalizer."""
    return _forward(plan, operands)[0]


def _forward(plan, operands):
    (B, T, H, _), v = operands.q.shape, operands.v
    call = functools.partial(_call, plan, (operands,), (OPERANDS,))
    results = jax.ShapeDtypeStruct((B, T, H, v.shape[-1]), v.dtype), float32(B, H, T)
    out, log_normalizer = call(_output, T // plan.block, results, ("BtHd", "BHt"))
    return (out, log_normalizer), (operands, out, log_normalizer)


def _backward(plan, residuals, grads):
    grad, grad_log = grads
    operands, out, log_normalizer = residuals
    (B, T, H, _), (_, S, K, _), b = operands.q.shape, operands.k.shape, plan.block
    # As in FlashAttention: the backward pass of softmax subtracts delta = sum(grad * out) of each query.
    delta = jnp.einsum("bthe,bthe->bht", grad.astype(jnp.float32), out.astype(jnp.float32)) - grad_log
    call = functools.partial(_call, plan, (operands, grad, log_normalizer, delta), BACKWARD)

    results = (
        jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
        tuple(float32(B, H, T) for _ in operands.query),
        tuple(float32(B, H, T // b, pl.next_power_of_2(x.shape[1])) for x in operands.numbers),
    )
    d_q, d_query, d_numbers = call(_gradient_of_queries, T // b, results, ("BtHd", "BHt", "BHin"))
    d_numbers = tuple(d.sum(axis=(0, 2))[:, : x.shape[1]] for d, x in zip(d_numbers, operands.numbers, strict=True))

    dtype = operands.k.dtype if K == H else jnp.float32  # query heads that share keys are summed below, in float32
    results = (
        *(jax.ShapeDtypeStruct((B, S, H, x.shape[-1]), dtype) for x in (operands.k, operands.v)),
        tuple(float32(B, H, S) for _ in operands.key),
    )
    d_k, d_v, d_key = call(_gradient_of_keys, S // b, results, ("BtHd", "BtHd", "BHt"))
    d_k, d_v = (x.reshape(B, S, K, H // K, -1).sum(axis=3).astype(operands.k.dtype) for x in (d_k, d_v))

    d_vector = None
    if operands.vector is not None:
        diagonals, n = plan.diagonals(T), operands.vector.shape[1]
        results = float32(B, H, len(diagonals), b, b)
        blocks = call(_gradient_of_distances, len(diagonals), results, "BHiab").sum(axis=0)
        d_vector = _along_diagonals(blocks)[:, b - 1 - plan.offset - diagonals[0] * b :][:, :n]
        d_vector = jnp.pad(d_vector, ((0, 0), (0, n - d_vector.shape[1])))
    return (Operands(d_q, d_k, d_v, d_query, d_key, d_numbers, d_vector, None, None),)


_attention.defvjp(_forward, _backward)


def _output(program: Program, out: Any, log_normalizer: Any) -> None:
    i, operands, b = pl.program_id(0), program.operands, program.plan.block
    q, queries = program.block(operands.q, i), program.queries(i, axis=0)

    def add_block(j, sums):
        k, v, keys = program.block(operands.k, j), program.block(operands.v, j), program.keys(j, axis=1)
        z = program.logits(_product(q, k.T), program.bias(program.feature(queries, keys)), queries, keys)
        return with_keys(sums, z, lambda weights: _product(weights.astype(v.dtype), v))

    first, stop = program.plan.visible_keys(i, operands.k.shape[0] // program.plan.block)
    total, normalizer, maximum = lax.fori_loop(first, stop, add_block, no_keys((b,), operands.v.shape[1]))
    out[...] = (total / normalizer[:, None]).astype(out.dtype)
    log_normalizer[...] = maximum + jnp.log(normalizer)


def _gradient_of_queries(program, grad, log_normalizer, delta, d_q, d_query, d_numbers):
    i, operands = pl.program_id(0), program.operands
    q, grad, queries = program.block(operands.q, i), program.block(grad, i), program.queries(i, axis=0)
    log_normalizer, delta = (program.block(x, i)[:, None] for x in (log_normalizer, delta))

    def add_block(j, totals):
        of_q, of_terms, of_numbers = totals
        k, v, keys = program.block(operands.k, j), program.block(operands.v, j), program.keys(j, axis=1)
        feature, pull_back = jax.vjp(lambda terms: program.feature(queries._replace(terms=terms), keys), queries.terms)
        z = program.logits(_product(q, k.T), program.bias(feature), queries, keys)
        d_z = jnp.exp(z - log_normalizer) * (_product(grad, v.T) - delta)
        of_q += _product(d_z.astype(k.dtype), k)
        if feature is not None:
            d_feature, of_numbers = program.bias_gradient(feature, d_z, of_numbers)
            of_terms = tuple(map(operator.add, of_terms, *pull_back(d_feature)))
        return of_q, of_terms, of_numbers

    first, stop = program.plan.visible_keys(i, operands.k.shape[0] // program.plan.block)
    of_q, of_terms, of_numbers = lax.fori_loop(first, stop, add_block, zeros((q, queries.terms, d_numbers)))
    d_q[...] = (of_q * program.plan.scale).astype(d_q.dtype)
    for ref, x in zip(d_query, of_terms, strict=True):
        ref[...] = x.squeeze(axis=1)
    for ref, x in zip(d_numbers, of_numbers, strict=True):
        ref[...] = x


def _gradient_of_keys(program, grad, log_normalizer, delta, d_k, d_v, d_key):
    j, operands = pl.program_id(0), program.operands
    k, v, keys = program.block(operands.k, j), program.block(operands.v, j), program.keys(j, axis=0)

    def add_block(i, totals):
        of_k, of_v, of_terms = totals
        q, own_grad, queries = program.block(operands.q, i), program.block(grad, i), program.queries(i, axis=1)
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

    first, stop = program.plan.visible_queries(j, operands.q.shape[0] // program.plan.block)
    of_k, of_v, of_terms = lax.fori_loop(first, stop, add_block, zeros((k, v, keys.terms)))
    d_k[...] = (of_k * program.plan.scale).astype(d_k.dtype)
    d_v[...] = of_v.astype(d_v.dtype)
    for ref, x in zip(d_key, of_terms, strict=True):
        ref[...] = x.squeeze(axis=1)


def _gradient_of_distances(program, grad, log_normalizer, delta, d_blocks):
    """Sum the blocks of one diagonal. The same entry of each block belongs to the same distance."""
    operands, b = program.operands, program.plan.block
    diagonal = pl.program_id(0) + program.plan.diagonals(operands.q.shape[0])[0]
    n, m = operands.q.shape[0] // b, operands.k.shape[0] // b

    def add_block(i, total):
        j = i - diagonal
        q, k, v = program.block(operands.q, i), program.block(operands.k, j), program.block(operands.v, j)
        own_grad = program.block(grad, i)
        z = program.logits(_product(q, k.T), None, program.queries(i, axis=0), program.keys(j, axis=1))
        worth = _product(own_grad, v.T) - program.block(delta, i)[:, None]
        return total + jnp.exp(z - program.block(log_normalizer, i)[:, None]) * worth

    first, stop = jnp.maximum(diagonal, 0), jnp.minimum(diagonal + m, n)
    d_blocks[...] = lax.fori_loop(first, stop, add_block, jnp.zeros((b, b), jnp.float32))


def _product(x: Array, y: Array) -> Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _along_diagonals(blocks: Float[Array, "H D b b"]) -> Float[Array, "H n"]:
    """Sum the entries of each distance, in ascending order, given one block for each of D adjacent block diagonals."""
    H, D, b, _ = blocks.shape
    # Reverse the keys, then shift each row one place further right than the row above, so that equal distances are in
    # the same column. The shift is done by padding rows to 2b numbers and reshaping them to rows of 2b - 1.
    rows = jnp.pad(blocks[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, b))).reshape(H, D, -1)
    sums = jnp.pad(rows[..., : b * (2 * b - 1)].reshape(H, D, b, 2 * b - 1).sum(axis=2), ((0, 0), (0, 0), (0, 1)))
    # Each diagonal starts b distances after the previous one, and half of the distances of the two are the same.
    lower, upper = sums[..., :b], sums[..., b:]
    total = jnp.pad(lower, ((0, 0), (0, 1), (0, 0))) + jnp.pad(upper, ((0, 0), (1, 0), (0, 0)))
    return total.reshape(H, -1)


def _call(plan, given, given_axes, kernel, count, results, result_axes) -> Any:
    """Run a kernel with `count` program instances for each head of each sequence.

    The axis names of an array (see `programs.block_specs`) say which part of it an instance gets: its sequence (B), its
    head (H), its block of tokens (t), its own entry (i), and the whole of any other axis.
    """
    operands = given[0]
    B, _, H, _ = operands.q.shape
    tiling = _tiling(operands.q, operands.v)

    def place(i, sequence_and_head):
        return {"B": sequence_and_head // H, "H": sequence_and_head % H, "t": i, "i": i}

    sizes, counts = {"B": None, "H": None, "i": None, "t": plan.block}, {"B": B, "H": H}
    specs = functools.partial(block_specs, sizes=sizes, counts=counts, place=place)
    return pl.pallas_call(
        lambda operands, *refs: kernel(Program(plan, operands), *refs),
        grid=(count, B * H),  # two axes, so that vmap can add a third; a GPU grid has at most three
        in_specs=specs(given_axes, given),
        out_specs=specs(result_axes, results),
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=plan.interpret,
        name=f"attention{kernel.__name__}",
    )(*given)
