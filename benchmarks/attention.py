"""Compares the attention algorithms on this device: agreement with dense attention, and run time.

    python -m benchmarks.attention                                        on a GPU or TPU: bfloat16, 1024 to 8192 tokens
    python -m benchmarks.attention alibi fire --lengths 4096 --heads 16 --head-dim 128

There is a row for each encoding and each algorithm that supports it on this device. It contains:

- the maximum error of the output and of the gradients (of queries, keys, values, inputs and parameters), compared with
  dense attention in full float32 precision. Errors are relative to the largest entry, and are measured at an odd
  length.
- the milliseconds of a forward and backward pass at each length, the minimum over --repeats.

The exit code is 1 if the error of an algorithm is more than three times that of dense attention in the same dtype. On a
CPU, kernels are interpreted. The default sizes are tiny there, and the times are meaningless.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from posenc_jax import command, encodings
from posenc_jax.attention import fused
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.dense import dense
from posenc_jax.attention.pallas import kernel, tpu_kernel
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Dims, Encoding

NAMES = ("none", "rope", "alibi", "kerple", "t5", "fire", "fox", "grape_a")
CHECKED = 501  # tokens; the length at which errors are measured
DENSE_UP_TO = 4096  # tokens; the maximum length at which dense attention is timed
MASK = AttentionMask(contiguous=True)


def main(arguments: list[str] | None = None) -> int:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"encodings; default: {' '.join(NAMES)}")
    parser.add_argument(
        "--lengths", type=command.count, nargs="+", default=[128] if on_cpu else [1024, 2048, 4096, 8192]
    )
    parser.add_argument(
        "--checked", type=command.count, default=75 if on_cpu else CHECKED, help="length at which errors are measured"
    )
    parser.add_argument(
        "--tokens", type=command.count, default=128 if on_cpu else 16384, help="tokens in a batch, at each length"
    )
    parser.add_argument("--heads", type=command.count, default=2 if on_cpu else 12)
    parser.add_argument("--kv-heads", type=command.count, help="default: the same as --heads")
    parser.add_argument("--head-dim", type=command.count, default=16 if on_cpu else 64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--repeats", type=command.count, default=1 if on_cpu else 10)
    args = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.dtype}, {args.heads} heads of {args.head_dim}")
    print("\t".join(["encoding", "algorithm", "error", "gradient error", *(f"ms at {n}" for n in args.lengths)]))
    failed = []
    for name in args.names:
        dims = Dims(args.heads * args.head_dim, args.heads, args.kv_heads or args.heads, args.head_dim, 1024)
        encoding = encodings.build(name, dims, nnx.Rngs(0))
        with jax.default_matmul_precision("highest"):
            exact = Pass(encoding, dense, dims, 2, args.checked, "float32")()
        allowed = None
        for algorithm, attend in algorithms(encoding, dims, args.dtype):
            errors = relative_errors(Pass(encoding, attend, dims, 2, args.checked, args.dtype)(), exact)
            allowed = allowed or [3 * error + 1e-4 for error in errors]
            times = [
                f"{1e3 * seconds(Pass(encoding, attend, dims, -(-args.tokens // n), n, args.dtype), args.repeats):.2f}"
                if algorithm != "dense" or n <= DENSE_UP_TO
                else "-"
                for n in args.lengths
            ]
            print("\t".join([name, algorithm, *(f"{error:.1e}" for error in errors), *times]), flush=True)
            if not all(error <= limit for error, limit in zip(errors, allowed, strict=True)):
                failed.append(f"{name} with {algorithm}")
    print(f"wrong: {', '.join(failed)}" if failed else "all agree with dense attention")
    return 1 if failed else 0


def algorithms(encoding: Encoding, dims: Dims, dtype: str) -> Iterator[tuple[str, Callable[..., jax.Array]]]:
    """The algorithms that support the encoding on this device, dense first."""
    backend = jax.default_backend()
    q, k = (jnp.zeros((1, 8, heads, dims.head_dim), dtype) for heads in (dims.num_heads, dims.num_kv_heads))
    positions = jnp.arange(8)[None]
    ctx = encoding.prepare(jnp.zeros((1, 8, dims.d_model)), positions)
    v, (q, k) = k, encoding.rotate(q, k, positions, positions, ctx)
    inputs = AttentionInputs(q, k, v, positions, positions, ctx)
    yield "dense", dense
    yield "blockwise", blockwise
    if backend != "tpu" and kernel.runs(encoding, inputs, MASK):
        yield "kernel", functools.partial(kernel.kernel, interpret=backend == "cpu")
    if backend != "gpu" and tpu_kernel.runs(encoding, inputs, MASK):
        yield "tpu_kernel", functools.partial(tpu_kernel.tpu_kernel, interpret=backend == "cpu")
    if fused.runs(encoding, inputs, MASK, backend):
        yield "fused", fused.fused


class Pass:
    """A call returns the output of attention on random arrays, and the gradients of its product with a random array."""

    def __init__(
        self,
        encoding: Encoding,
        attend: Callable[..., jax.Array],
        dims: Dims,
        batch: int,
        length: int,
        dtype: str,
    ):
        graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)
        keys = jax.random.split(jax.random.key(0), 5)
        heads = dims.num_heads, dims.num_kv_heads, dims.num_kv_heads, dims.num_heads
        *qkv, direction = (
            jax.random.normal(key, (batch, length, n, dims.head_dim)).astype("bfloat16").astype(dtype)
            for key, n in zip(keys, heads, strict=False)
        )
        x = jax.random.normal(keys[4], (batch, length, dims.d_model))
        positions = jnp.arange(length)[None]

        def output(params, q, k, v, x):
            encoding = nnx.merge(graphdef, params, constants)
            ctx = encoding.prepare(x, positions)
            q, k = encoding.rotate(q, k, positions, positions, ctx)
            return attend(encoding, AttentionInputs(q, k, v, positions, positions, ctx), MASK)

        def value_and_gradients(*arrays):
            out, pull_back = jax.vjp(output, *arrays)
            return out, pull_back(direction)

        arrays = nnx.to_pure_dict(params), *qkv, x
        self._call = functools.partial(jax.jit(value_and_gradients), *arrays)

    def __call__(self) -> tuple[jax.Array, Any]:
        return jax.block_until_ready(self._call())


def relative_errors(found: tuple[jax.Array, Any], exact: tuple[jax.Array, Any]) -> list[float]:
    """The relative error of the output, and the largest relative error of a gradient."""

    def error(a, b):
        return float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.maximum(jnp.abs(b).max(), 1e-6))

    gradients = zip(jax.tree.leaves(found[1]), jax.tree.leaves(exact[1]), strict=True)
    return [error(found[0], exact[0]), max(error(a, b) for a, b in gradients)]


def seconds(run: Pass, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)


if __name__ == "__main__":
    command.run(main)
