"""Attention as kernels for a GPU, with the encoding's bias computed inside them: logits never reach memory.

They compute what `blockwise` does, by the same algorithm, in Pallas for Triton. A program owns a block of queries of
one head (their output or their gradient), a block of keys (the gradient of keys and values) or a diagonal of blocks
(the gradient of a bias by distance), and reads the others block by block. As each sum has one owner there are no atomic
additions, and the same input gives the same bits.
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
    block: int  # queries, and keys
    warps: int
    stages: int


# By the bytes that a token's queries, keys or values take at most in a head: so that, compiled, no kernel needs more
# than the 99 KiB of fast memory that every GPU from Ampere on has for a program.
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
    """What `dense` computes, where `runs` says so.

    Gradients reach q, k, v, ctx and the arrays of the encoding. A `block` is so many queries, or keys; by default as in
    `TILINGS`. With `interpret` the kernels run as JAX's own operations, on any device.
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
    """Whether the kernels compute the attention of an encoding with such queries and values."""
    return programs.computes(encoding, attention_mask) and _row_bytes(q, v) <= max(TILINGS)


def _width(x: Float[Array, "B T H d"]) -> int:
    """Channels of a head in the kernels: a power of two, of which Triton's products need 16."""
    return max(16, pl.next_power_of_2(x.shape[-1]))


def _row_bytes(q: Float[Array, "B T H d"], v: Float[Array, "B S K e"]) -> int:
    return max(_width(q), _width(v)) * v.dtype.itemsize


def _widen(x: Float[Array, "B T H d"]) -> Float[Array, "B T H w"]:
    """Channels of zeros added."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, _width(x) - x.shape[-1])])


# The names of axes; see `_call`.
INPUTS = Inputs("BTHd", "BTHd", "BTHd", "BHT", "BHT", "Hn", "Hn", "BT", "BT")  # type: ignore[arg-type]
BACKWARD = INPUTS, "BTHd", "BHT", "BHT"  # with the gradient of the output, and two numbers of each query


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
    # What each query's output, as a whole, is worth to the loss: softmax subtracts it from each weight's worth.
    delta = jnp.einsum("bthe,bthe->bht", grad.astype(jnp.float32), out.astype(jnp.float32))
    call = functools.partial(_call, tiling, plan, interpret, (inputs, grad, log_normalizer, delta), BACKWARD)

    results = (
        jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype),
        tuple(_float32(B, H, T) for _ in inputs.query),
        tuple(_float32(B, H, T // b, pl.next_power_of_2(x.shape[1])) for x in inputs.numbers),
    )
    d_q, d_query, d_numbers = call(programs.gradient_of_queries, T // b, results, ("BtHd", "BHt", "BHin"))
    d_numbers = tuple(d.sum(axis=(0, 2))[:, : x.shape[1]] for d, x in zip(d_numbers, inputs.numbers, strict=True))

    dtype = inputs.k.dtype if K == H else jnp.float32  # of sums that go on, over the heads that share keys
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
    """Sums at each distance from the lowest on, of the blocks of neighbouring diagonals of blocks."""
    H, D, b, _ = blocks.shape
    # Keys from the last to the first, then each row one place further right than that above, so that equal distances
    # stand below each other: that is to cut rows of 2b numbers, written one after another, into rows of 2b - 1.
    rows = jnp.pad(blocks[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, b))).reshape(H, D, -1)
    sums = jnp.pad(rows[..., : b * (2 * b - 1)].reshape(H, D, b, 2 * b - 1).sum(axis=2), ((0, 0), (0, 0), (0, 1)))
    # Each diagonal begins b distances after that before, half of whose distances it shares.
    lower, upper = sums[..., :b], sums[..., b:]
    total = jnp.pad(lower, ((0, 0), (0, 1), (0, 0))) + jnp.pad(upper, ((0, 0), (1, 0), (0, 0)))
    return total.reshape(H, -1)


def _call(tiling, plan, interpret, given, given_axes, kernel, count, results, result_axes) -> Any:
    """Run a kernel, as so many programs for each head of each sequence.

    The names of an array's axes say what of it a program refers to: of B its sequence, of H its head, of t its block of
    tokens, of i its own entry, of other axes all. Sequences may share an entry, and so may groups of heads.
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
        grid=(count, B * H),  # two axes, so that vmap may add the third, the last that a GPU has
        in_specs=specs(given_axes, given),
        out_specs=specs(result_axes, results),
        out_shape=results,
        compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name=f"attention_{kernel.__name__}",
    )(*given)
