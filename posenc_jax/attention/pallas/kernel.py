"""Attention kernels for GPUs. They compute the encoding's bias on the fly, so logits are never written to memory.

The kernels use the same algorithm as `blockwise`, written in Pallas for Triton. Each program instance owns one of:

- a block of queries of one head, for the output or the gradient of the queries;
- a block of keys of one head, for the gradients of the keys and values;
- a diagonal of blocks, for the gradient of a bias by distance.

It reads the other operands block by block. Each sum is accumulated by a single program instance. There are therefore
no atomic additions, and the same input gives the same bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Real

from posenc_jax.attention.pallas import programs
from posenc_jax.attention.pallas.programs import Inputs, Plan, Program
from posenc_jax.encodings.base import CAUSAL, AttentionMask, Context, DistanceBias, Encoding, distance_bias_of


class Tiling(NamedTuple):
    block: int  # number of queries, and of keys, in a block
    warps: int
    stages: int


# The key is the largest size in bytes of one token's query, key or value in one head. The tilings are chosen so that no
# compiled kernel needs more than 99 KiB of shared memory, which every GPU since Ampere offers to a thread block.
TILINGS = {128: Tiling(64, warps=4, stages=2), 256: Tiling(64, warps=8, stages=1), 512: Tiling(32, warps=4, stages=2)}


def kernel(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S K d"],
    v: Float[Array, "B S K e"],
    q_pos: Real[Array, "#B T"],
    k_pos: Real[Array, "#B S"],
    ctx: Context,
    attention_mask: AttentionMask = CAUSAL,
    block: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H e"]:
    """Compute the same attention as `dense`, for the inputs that `runs` accepts.

    Gradients flow to q, k, v, ctx and the arrays of the encoding. `block` is the number of queries, and of keys, in a
    block; the default is in `TILINGS`. With `interpret`, the kernels are emulated with JAX operations on any device.
    """
    tiling = TILINGS[min(size for size in TILINGS if size >= _row_bytes(q, v))]
    tiling = tiling._replace(block=block or tiling.block)
    plan, inputs = programs.plan_and_inputs(encoding, q, k, v, q_pos, k_pos, ctx, attention_mask, tiling.block)
    inputs = inputs._replace(q=_widen(inputs.q), k=_widen(inputs.k), v=_widen(inputs.v))
    if isinstance(encoding, DistanceBias):
        inputs = inputs._replace(vector=distance_bias_of(encoding, jnp.arange(k.shape[1])))
    out: Array = _attention(tiling, plan, interpret, inputs)
    return out[:, : q.shape[1], :, : v.shape[-1]]


def runs(
    encoding: Encoding, q: Float[Array, "B T H d"], v: Float[Array, "B S K e"], attention_mask: AttentionMask
) -> bool:
    """Whether the kernels support this encoding, mask, and size of queries and values."""
    return programs.computes(encoding, attention_mask) and _row_bytes(q, v) <= max(TILINGS)


def _width(x: Float[Array, "B T H d"]) -> int:
    """The head dimension inside the kernels: a power of two, and at least 16, the minimum for Triton's `dot`."""
    return max(16, pl.next_power_of_2(x.shape[-1]))


def _row_bytes(q: Float[Array, "B T H d"], v: Float[Array, "B S K e"]) -> int:
    return max(_width(q), _width(v)) * v.dtype.itemsize


def _widen(x: Float[Array, "B T H d"]) -> Float[Array, "B T H w"]:
    """Pad the channels with zeros to `_width`."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, _width(x) - x.shape[-1])])


# Axis names; see `_call`.
INPUTS = Inputs("BTHd", "BTHd", "BTHd", "BHT", "BHT", "Hn", "Hn", "BT", "BT")  # type: ignore[arg-type]
BACKWARD = INPUTS, "BTHd", "BHT", "BHT"  # the inputs, the gradient of the output, log_normalizer and delta


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(tiling: Tiling, plan: Plan, interpret: bool, inputs: Inputs) -> Float[Array, "B T H e"]:
    return _forward(tiling, plan, interpret, inputs)[0]


def _forward(tiling, plan, interpret, inputs):
    (B, T, H, _), v = inputs.q.shape, inputs.v
    call = functools.partial(_call, tiling, plan, interpret, (inputs,), (INPUTS,))
    results = jax.ShapeDtypeStruct((B, T, H, v.shape[-1]), v.dtype), _float32(B, H, T)
    out, log_normalizer = call(programs.output, T // plan.block, results, ("BtHd", "BHt"))
    return out, (inputs, out, log_normalizer)


def _backward(tiling, plan, interpret, residuals, grad):
    inputs, out, log_normalizer = residuals
    (B, T, H, _), (_, S, K, _), b = inputs.q.shape, inputs.k.shape, plan.block
    # As in FlashAttention: the backward pass of softmax subtracts delta = sum(grad * out) of each query.
    delta = jnp.einsum("bthe,bthe->bht", grad.astype(jnp.float32), out.astype(jnp.float32))
    call = functools.partial(_call, tiling, plan, interpret, (inputs, grad, log_normalizer, delta), BACKWARD)

    results = (
        jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        tuple(_float32(B, H, T) for _ in inputs.query),
        tuple(_float32(B, H, T // b, pl.next_power_of_2(x.shape[1])) for x in inputs.numbers),
    )
    d_q, d_query, d_numbers = call(programs.gradient_of_queries, T // b, results, ("BtHd", "BHt", "BHin"))
    d_numbers = tuple(d.sum(axis=(0, 2))[:, : x.shape[1]] for d, x in zip(d_numbers, inputs.numbers, strict=True))

    dtype = inputs.k.dtype if K == H else jnp.float32  # query heads that share keys are summed below, in float32
    results = (
        *(jax.ShapeDtypeStruct((B, S, H, x.shape[-1]), dtype) for x in (inputs.k, inputs.v)),
        tuple(_float32(B, H, S) for _ in inputs.key),
    )
    d_k, d_v, d_key = call(programs.gradient_of_keys, S // b, results, ("BtHd", "BtHd", "BHt"))
    d_k, d_v = (x.reshape(B, S, K, H // K, -1).sum(axis=3).astype(inputs.k.dtype) for x in (d_k, d_v))

    d_vector = None
    if inputs.vector is not None:
        diagonals, n = plan.diagonals(T), inputs.vector.shape[1]
        results = _float32(B, H, len(diagonals), b, b)
        blocks = call(programs.gradient_of_distances, len(diagonals), results, "BHiab").sum(axis=0)
        d_vector = _along_diagonals(blocks)[:, b - 1 - plan.offset - diagonals[0] * b :][:, :n]
        d_vector = jnp.pad(d_vector, ((0, 0), (0, n - d_vector.shape[1])))
    return (Inputs(d_q, d_k, d_v, d_query, d_key, d_numbers, d_vector, None, None),)


_attention.defvjp(_forward, _backward)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


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


def _call(tiling, plan, interpret, given, given_axes, kernel, count, results, result_axes) -> Any:
    """Run a kernel with `count` program instances for each head of each sequence.

    The axis names of an array say which part of it a program instance gets: its sequence (B), its head (H), its block
    of tokens (t), its own entry (i), and the whole of any other axis. Sequences may share an entry (size 1), and so may
    groups of heads (fewer entries than heads).
    """
    B, _, H, _ = given[0].q.shape
    counts, blocks = {"B": B, "H": H}, {"B": None, "H": None, "i": None, "t": plan.block}

    def spec(axes, x):
        sizes = dict(zip(axes, x.shape, strict=True))

        def index(i, sequence_and_head):
            own = {"B": sequence_and_head // H, "H": sequence_and_head % H, "t": i, "i": i}
            return tuple(own.get(axis, 0) // (counts.get(axis, n) // n) for axis, n in sizes.items())

        return pl.BlockSpec(tuple(blocks.get(axis, n) for axis, n in sizes.items()), index)

    def specs(axes, arrays):
        return jax.tree.map(lambda axes, part: jax.tree.map(functools.partial(spec, axes), part), axes, arrays)

    return pl.pallas_call(
        lambda inputs, *refs: kernel(Program(plan, inputs), *refs),
        grid=(count, B * H),  # two axes, so that vmap can add a third; a GPU grid has at most three
        in_specs=specs(given_axes, given),
        out_specs=specs(result_axes, results),
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=f"attention_{kernel.__name__}",
    )(*given)
