"""Attention of queries, keys and values under any encoding, and the choice of the algorithm that computes it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.attention import fused
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.by_query import by_query
from posenc_jax.attention.dense import dense
from posenc_jax.attention.pallas import kernel, tpu_kernel
from posenc_jax.attention.right_to_left import right_to_left
from posenc_jax.attention.target import Target, target
from posenc_jax.attention.temperature import Temperature
from posenc_jax.distributed.parallel import divided_axes, map_rows
from posenc_jax.documents import Documents, places
from posenc_jax.encodings.base import (
    CAUSAL,
    AttentionInputs,
    AttentionMask,
    Context,
    Encoding,
    KeyPositions,
    Keys,
    Queries,
    QueryPositions,
    overrides,
    reads_both_ways,
)

# Up to so many tokens `dense` is faster than blocks of keys, and than whole rows.
DENSE_UP_TO, DENSE_ROWS_UP_TO = 128, 256
DTYPES = "float32", "bfloat16", "float16"


def attention(
    encoding: Encoding,
    q: Array,
    k: Array,
    v: Array,
    positions: Any = None,
    mask: AttentionMask = CAUSAL,
    *,
    x: Array | None = None,
    temperature: Temperature | None = None,
    sinks: Array | None = None,
    documents: Any = None,
    attend: Callable[..., Array] | None = None,
) -> Array:
    """Attention under an encoding: its hooks `prepare` and `rotate`, then the fastest algorithm that it allows.

    Letters: B sequences; S keys; T <= S queries, which are the last T of the S tokens; H query heads, which share K
    heads of keys; d channels of a query or key; e channels of a value; D the width of the model. Shapes are checked
    when the function is called or, under `jax.jit` and `jax.grad`, traced.

    q, k and v have one dtype: float32, bfloat16 or float16. Logits, biases and weights are computed in float32, and the
    output has the dtype of v. The arrays of the encoding are float32.

    Encodings that are added to token embeddings (`sinusoidal`, `learned`) do nothing here. Call `encoding.embed` on the
    embeddings; it returns them unchanged for all other encodings.

    Args:
      encoding: as `posenc_jax.encodings.build` returns it.
      q: [B, T, H, d].
      k: [B, S, K, d].
      v: [B, S, K, e].
      positions: of all S tokens: [S], [1, S] or [B, S], whole numbers or float32. Default: 0 .. S - 1, or with
        `documents` 0, 1, 2 .. from the first token of each.
      mask: which keys a query sees, by the order of tokens and not by their positions.
      x: [B, S, D], from which q, k and v were projected. Encodings that override `prepare` need it.
      temperature: scales the queries after the encoding has rotated them.
      sinks: [H], float32. Logits that take weight from all keys: see `posenc_jax.attention.sinks`.
      documents: [B, S], int32. The number of each token's document, which increases from one document to the next. A
        query sees only keys of its own document, and the output of each document is that of the document alone.
      attend: the algorithm, such as `posenc_jax.attention.dense.dense`. Default: `fastest`.

    Returns:
      [B, T, H, e], with `encoding.head_factor` times as many heads as q.

    Raises:
      ValueError: for an argument whose shape or dtype does not fit the others, or the sizes that the encoding was built
        for. The message has the argument, its value and what is allowed.
    """
    _check_kinds(encoding, mask)
    _check_shapes(encoding, q, k, v, x)
    _check_sinks(encoding, q, sinks)
    documents = _checked_documents(encoding, k, documents)
    (B, T), S = q.shape[:2], k.shape[1]
    if positions is None:
        mask = dataclasses.replace(mask, contiguous=True)
    k_pos = _checked_positions(positions, B, S) if positions is not None or documents is None else places(documents)
    q_pos = k_pos[:, S - T :]
    own = {} if documents is None else {"documents": documents}
    q_ctx, k_ctx = (None, None) if x is None else encoding.prepare(x, k_pos, **own)
    if T < S:
        q_ctx = jax.tree.map(lambda leaf: leaf[:, S - T :], q_ctx)
    ctx = q_ctx, k_ctx
    q, k = encoding.rotate(q, k, q_pos, k_pos, ctx)
    of_both = None if documents is None else (documents[:, S - T :], documents)
    inputs = AttentionInputs(q, k, v, q_pos, k_pos, ctx, sinks, of_both)
    return attend_rotated(encoding, inputs, mask, temperature, attend)


def attend_rotated(
    encoding: Encoding,
    inputs: AttentionInputs,
    mask: AttentionMask,
    temperature: Temperature | None = None,
    attend: Callable[..., Array] | None = None,
) -> Float[Array, "B T H e"]:
    """The part of `attention` after `rotate`: the temperature, and the algorithm."""
    if temperature is not None:
        earlier = inputs.k.shape[1] - inputs.q.shape[1]
        own = None if inputs.documents is None else places(inputs.documents[1])[:, earlier:]
        inputs = inputs._replace(q=temperature(inputs.q, inputs.q_pos, mask.window, earlier, own))
    return _attended(attend or fastest(encoding, inputs, mask), encoding, mask, *inputs)


def _attended(
    attend: Callable[..., Array],
    encoding: Encoding,
    mask: AttentionMask,
    q: Queries,
    k: Keys,
    v: Float[Array, "B S K e"],
    q_pos: QueryPositions,
    k_pos: KeyPositions,
    ctx: Context,
    sinks: Float[Array, "H"] | None,
    documents: Documents | None,
) -> Float[Array, "B T H e"]:
    """The output of an algorithm. The annotations name the sizes that its arrays share, which the tests check."""
    return attend(encoding, AttentionInputs(q, k, v, q_pos, k_pos, ctx, sinks, documents), mask)


def fastest(encoding: Encoding, inputs: AttentionInputs, mask: AttentionMask) -> Callable[..., Array]:
    """The device's own algorithm, if it has one for this attention; else `algorithm`, of each device on its rows."""
    rows, length = inputs.q.shape[:2]
    own = algorithm(encoding, length)
    return accelerated(encoding, inputs, mask) or on_rows(own, rows) or own


def algorithm(encoding: Encoding, length: int) -> Callable[..., Array]:
    """The first of `right_to_left`, `blockwise` and `by_query` that the encoding's hooks allow; `dense` if it is short.

    All compute the same.
    """
    if overrides(encoding, "weights", "values"):
        attend = by_query
    elif overrides(encoding, "scan_step"):
        attend = right_to_left
    elif encoding.blockwise and not overrides(encoding, "scores"):
        attend = blockwise
    else:
        attend = by_query
    return dense if length <= (DENSE_ROWS_UP_TO if attend is by_query else DENSE_UP_TO) else attend


def accelerated(
    encoding: Encoding, inputs: AttentionInputs, mask: AttentionMask, device: Target | None = None
) -> Callable[..., Array] | None:
    """The fastest kernel of the device (by default `target`) for this attention; None if there is none.

    GPUs from NVIDIA's Ampere on have `fused`, by cuDNN, and `kernel`. TPUs have `fused`, by splash attention, and
    `tpu_kernel`. Each of several devices runs the kernel on its rows. Devices that share heads have only cuDNN's, and
    devices that share a window have none.
    """
    device, mesh = device or target(), jax.sharding.get_abstract_mesh()
    on_gpu, capability = device.platform == "gpu", device.compute_capability
    at_least_ampere = capability[:1].isdigit() and float(capability) >= 8
    if "sequence" in mesh.axis_names or (on_gpu and not at_least_ampere):
        return None
    if fused.runs(encoding, inputs, mask, device.platform):
        attend = fused.fused
        if on_gpu:
            return attend  # the compiler can divide cuDNN's kernels
    elif on_gpu and kernel.runs(encoding, inputs, mask):
        attend = kernel.kernel
    elif device.platform == "tpu" and tpu_kernel.runs(encoding, inputs, mask):
        attend = tpu_kernel.tpu_kernel
    else:
        return None
    # The compiler cannot divide Pallas kernels.
    if mesh.empty:
        return attend if jax.device_count() == 1 else None
    return on_rows(attend, len(inputs.q))


def on_rows(attend: Callable[..., Array], rows: int) -> Callable[..., Array] | None:
    """The algorithm, run by each device on its part of the rows. None if devices share heads or a window too.

    The compiler by itself would sum the gradient of a learned bias over devices after every block, not once.
    """
    divided = {axis: size for axis, size in divided_axes().items() if size > 1}
    if not divided:
        return attend
    if not divided.keys() <= {"data", "fsdp"} or rows % math.prod(divided.values()):
        return None

    def attend_rows(encoding, inputs, attention_mask):
        graphdef, arrays = nnx.split(encoding)

        def own(inputs, shared):
            arrays, sinks = shared
            return attend(nnx.merge(graphdef, arrays), inputs._replace(sinks=sinks), attention_mask)

        return map_rows(own, inputs._replace(sinks=None), (arrays, inputs.sinks))

    return attend_rows


def _check_kinds(encoding: Any, mask: Any) -> None:
    name = type(encoding).__name__
    if not isinstance(encoding, Encoding):
        shown = encoding if isinstance(encoding, str | type) else name
        raise _wrong("encoding", shown, "an encoding, as posenc_jax.encodings.build returns it")
    if not isinstance(mask, AttentionMask):
        raise _wrong("mask", type(mask).__name__, "an AttentionMask, such as AttentionMask(causal=True, window=128)")
    if not mask.causal and not reads_both_ways(encoding):
        raise _wrong("mask.causal", False, f"True for {name}, which does not define logits of keys ahead of a query")


def _check_shapes(encoding: Encoding, q: Array, k: Array, v: Array, x: Array | None) -> None:
    for name, array, axes in (("q", q, "[B, T, H, d]"), ("k", k, "[B, S, K, d]"), ("v", v, "[B, S, K, e]")):
        if array.ndim != 4:
            raise _wrong(f"{name}.shape", array.shape, axes)
        if array.dtype.name not in DTYPES or array.dtype != q.dtype:
            raise _wrong(f"{name}.dtype", array.dtype.name, f"one of {', '.join(DTYPES)}, the same for q, k and v")
    if x is None and overrides(encoding, "prepare", "extend"):
        raise _wrong("x", None, f"the input of the layer [B, S, D], which {type(encoding).__name__}.prepare reads")
    if x is not None and x.ndim != 3:
        raise _wrong("x.shape", x.shape, "[B, S, D]")
    (B, T, H, d), (S, K), widths = q.shape, k.shape[1:3], encoding.widths

    def built(name: str, axis: int, field: str) -> list[tuple[str, int, int, str]]:
        meaning = f"the {field} that the encoding was built for"
        return [] if widths is None else [(name, axis, getattr(widths, field), meaning)]

    sizes = [
        *built("q", 2, "num_heads"),
        *built("q", 3, "head_dim"),
        *built("k", 2, "num_kv_heads"),
        ("k", 0, B, "the batch of q"),
        ("k", 3, d, "the head_dim of q"),
        ("v", 0, B, "the batch of q"),
        ("v", 1, S, "the number of tokens of k"),
        ("v", 2, K, "the number of heads of k"),
        ("x", 0, B, "the batch of q"),
        ("x", 1, S, "the number of tokens of k"),
        *built("x", 2, "d_model"),
    ]
    arrays = {"q": q, "k": k, "v": v} | ({} if x is None else {"x": x})
    for name, axis, size, meaning in sizes:
        if name in arrays and arrays[name].shape[axis] != size:
            raise _wrong(f"{name}.shape[{axis}]", arrays[name].shape[axis], f"{size}, {meaning}")
    if H % K:
        raise _wrong("k.shape[2]", K, f"a divisor of q.shape[2] = {H}")
    if T > S:
        raise _wrong("q.shape[1]", T, f"at most k.shape[1] = {S}: the queries are the last of the tokens of k")


def _check_sinks(encoding: Encoding, q: Array, sinks: Array | None) -> None:
    if sinks is None:
        return
    if overrides(encoding, "weights"):
        raise _wrong("sinks", sinks.shape, f"None for {type(encoding).__name__}, which has no softmax")
    heads = encoding.head_factor * q.shape[2]
    if sinks.shape != (heads,) or sinks.dtype != jnp.float32:
        raise _wrong("sinks", f"{sinks.dtype.name}{list(sinks.shape)}", f"float32[{heads}], one per attention head")


def _checked_documents(encoding: Encoding, k: Array, documents: Any) -> Int[Array, "B S"] | None:
    if documents is None:
        return None
    documents = jnp.asarray(documents)
    if not encoding.packable:
        raise _wrong("documents", documents.shape, f"None for {type(encoding).__name__}, which reads other documents")
    if documents.shape != k.shape[:2] or documents.dtype != jnp.int32:
        allowed = f"int32{list(k.shape[:2])}, the number of the document of each token of k"
        raise _wrong("documents", f"{documents.dtype.name}{list(documents.shape)}", allowed)
    return documents


def _checked_positions(positions: Any, batch: int, tokens: int) -> Real[Array, "#B S"]:
    if positions is None:
        return jnp.arange(tokens)[None]
    positions = jnp.asarray(positions)
    if positions.shape not in ((tokens,), (1, tokens), (batch, tokens)):
        allowed = f"({tokens},), (1, {tokens}) or ({batch}, {tokens}): one for each token of k"
        raise _wrong("positions.shape", positions.shape, allowed)
    if not jnp.issubdtype(positions.dtype, jnp.integer) and positions.dtype != jnp.float32:
        raise _wrong("positions.dtype", positions.dtype.name, "a dtype of whole numbers, or float32")
    return positions.reshape(-1, tokens)


def _wrong(argument: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{argument} = {value!r}: must be {allowed}")
