"""Helpers: attention as a differentiable function of all its arrays, and the encodings that each algorithm serves."""

import dataclasses
import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import algorithm
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, AttentionMask, Dims
from tests.encodings.test_contract import forms, perturbed

CONTIGUOUS = AttentionMask(contiguous=True)
DIMS = Dims(d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, max_length=64)
GROUPED = Dims(d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
LONG = 10**6  # tokens


def forms_run_by(attend: Callable) -> list:
    """Every form of every encoding that uses this algorithm for long sequences."""
    return [form for form in forms() if algorithm(abstract(*form.values), LONG) is attend]


def abstract(name: str, hyperparameters: dict = types.MappingProxyType({}), dims: Dims = DIMS):
    """An encoding with abstract arrays, which compiles nothing."""
    return _abstract(name, tuple(hyperparameters.items()), dims)


@functools.cache
def _abstract(name: str, hyperparameters: tuple, dims: Dims):
    return nnx.eval_shape(lambda: encodings.build(name, dims, nnx.Rngs(0), **dict(hyperparameters)))


def build(name: str, hyperparameters: dict, dims: Dims = DIMS):
    return nnx.merge(*_built(name, tuple(hyperparameters.items()), dims), copy=True)


@functools.cache
def _built(name: str, hyperparameters: tuple, dims: Dims):
    """The graphdef and arrays of an encoding, which are created once: each array takes a compiled program."""
    with jax.ensure_compile_time_eval():
        return nnx.split(perturbed(encodings.build(name, dims, nnx.Rngs(0), **dict(hyperparameters))))


def value_and_gradients(attend, encoding, length, queries, *, kv_heads=2, dtype=jnp.float32, attention_mask=CAUSAL):
    """The output of the last queries, and gradients of a scalar of it for parameters, q, k, v and the layer input x."""
    return jax.jit(jax.value_and_grad(loss(attend, encoding, queries, attention_mask), has_aux=True))(
        arrays(encoding, length, kv_heads, dtype)
    )


def loss(attend, encoding, queries, attention_mask=CAUSAL):
    graphdef, _, constants = nnx.split(encoding, nnx.Param, ...)

    def scalar(arrays):
        params, q, k, v, x = arrays
        own = nnx.merge(graphdef, params, constants)
        positions = jnp.arange(k.shape[1])[None]
        ctx = own.prepare(x, positions)
        ctx = jax.tree.map(lambda leaf: leaf[:, -queries:], ctx[0]), ctx[1]
        q, k = own.rotate(q[:, -queries:], k, positions[:, -queries:], positions, ctx)
        out = attend(own, AttentionInputs(q, k, v, positions[:, -queries:], positions, ctx), attention_mask)
        return jnp.sin(out.astype(jnp.float32)).sum(), out

    return scalar


def arrays(encoding, length, kv_heads=2, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v = (
        jax.random.normal(key, (2, length, heads, 8)).astype(dtype)
        for key, heads in zip(keys, (2, kv_heads, kv_heads), strict=False)
    )
    return nnx.state(encoding, nnx.Param), q, k, v, jax.random.normal(keys[3], (2, length, 16))


def assert_equals_dense(attend, name, hyperparameters, length, queries, kv_heads=2, attention_mask=CAUSAL):
    encoding = build(name, hyperparameters, dataclasses.replace(DIMS, num_kv_heads=kv_heads))
    (_, expected), expected_gradients = value_and_gradients(
        dense, encoding, length, queries, kv_heads=kv_heads, attention_mask=attention_mask
    )
    (_, found), gradients = value_and_gradients(
        attend, encoding, length, queries, kv_heads=kv_heads, attention_mask=attention_mask
    )
    np.testing.assert_allclose(found, expected, atol=2e-5, equal_nan=False)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4, equal_nan=False)
    jax.tree.map(close, gradients, expected_gradients)


def assert_skips_blocks_ahead(attend, name):
    """`attend` must have blocks of 16."""
    out, (_, d_q, _, _, _) = with_nan(attend, name, AttentionMask(contiguous=True), keys=slice(80, None))
    assert all_finite(out[:, :80], d_q[:, :80])
    _, (_, _, d_k, d_v, _) = with_nan(attend, name, AttentionMask(contiguous=True), queries=slice(16))
    assert all_finite(d_k[:, 16:], d_v[:, 16:])


def assert_skips_blocks_before_the_window(attend, name):
    """`attend` must have blocks of at most 16."""
    attention_mask = AttentionMask(window=16, contiguous=True)
    assert all_finite(with_nan(attend, name, attention_mask, keys=slice(48), count=32))
    _, (_, _, d_k, d_v, _) = with_nan(attend, name, attention_mask, queries=slice(80, None))
    assert all_finite(d_k[:, :64], d_v[:, :64])


def with_nan(attend, name, attention_mask, *, queries=(), keys=(), count=96):
    """The output of the last `count` of 96 queries, and its gradients, if some queries, or keys and values, are NaN.

    Any product with NaN is NaN, even if the weight is zero. The result therefore shows which blocks were visited.
    """
    encoding = build(name, {})
    params, q, k, v, x = arrays(encoding, 96)
    q, k, v = (x.at[:, own].set(jnp.nan) for x, own in ((q, queries), (k, keys), (v, keys)))
    value = jax.jit(jax.value_and_grad(loss(attend, encoding, count, attention_mask), has_aux=True))
    (_, out), gradients = value((params, q, k, v, x))
    return out, gradients


def inputs(width=8, value_width=8):
    """Zeros, of which only the shapes matter."""
    q, v = (jnp.zeros((2, 50, 4, n)) for n in (width, value_width))
    positions = jnp.arange(50)[None]
    return AttentionInputs(q, q, v, positions, positions)


def all_finite(*arrays):
    return all(jnp.isfinite(x).all() for x in jax.tree.leaves(arrays))


def assert_bfloat16_as_close_as_dense(attend, name, hyperparameters):
    encoding = build(name, hyperparameters)
    exact = loss(dense, encoding, 100)(arrays(encoding, 100))[1]
    rounded = arrays(encoding, 100, dtype=jnp.bfloat16)
    errors = [
        float(jnp.abs(jax.jit(loss(form, encoding, 100))(rounded)[1].astype(jnp.float32) - exact).max())
        for form in (dense, attend)
    ]
    assert errors[1] < 1.5 * errors[0] + 1e-3


def temporary_bytes(attend, encoding, length):
    """The temporary memory of a compiled gradient, without arguments and results."""
    shapes = jax.eval_shape(lambda: arrays(encoding, length))
    gradient = jax.value_and_grad(lambda arrays: loss(attend, encoding, length)(arrays)[0])
    return jax.jit(gradient).lower(shapes).compile().memory_analysis().temp_size_in_bytes


def assert_kernel_equals_dense(
    attend, name, length, queries, attention_mask=CONTIGUOUS, positions=None, **hyperparameters
):
    """Check that outputs and gradients of all arrays agree, for the last queries and all keys. Heads share keys."""
    encoding = encodings.build(name, GROUPED, nnx.Rngs(0), **hyperparameters)
    graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)
    positions = jnp.arange(length)[None] if positions is None else positions
    keys = jax.random.split(jax.random.key(1), 4)
    q, k, v = (jax.random.normal(key, (2, length, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    arrays = nnx.to_pure_dict(params), q, k, v, jax.random.normal(keys[3], (2, length, 16))

    def loss(attend, arrays):
        params, q, k, v, x = arrays
        encoding = nnx.merge(graphdef, params, constants)
        ctx = encoding.prepare(x, positions)
        q, k = encoding.rotate(q, k, positions, positions, ctx)
        ctx = jax.tree.map(lambda leaf: leaf[:, -queries:], ctx[0]), ctx[1]
        inputs = AttentionInputs(q[:, -queries:], k, v, positions[:, -queries:], positions, ctx)
        out = attend(encoding, inputs, attention_mask)
        return jnp.sin(out).sum(), out

    value = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, expected), expected_gradients = value(dense, arrays)
    (_, found), gradients = value(attend, arrays)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, expected_gradients)


def assert_kernel_in_bfloat16_is_as_close_as_dense(attend, name):
    encoding = encodings.build(name, GROUPED, nnx.Rngs(0))
    keys, positions = jax.random.split(jax.random.key(1), 4), jnp.arange(50)[None]
    q, k, v = (jax.random.normal(key, (2, 50, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    ctx = encoding.prepare(jax.random.normal(keys[3], (2, 50, 16)), positions)
    exact = dense(encoding, AttentionInputs(q, k, v, positions, positions, ctx), CONTIGUOUS)
    errors = []
    for form in (dense, attend):
        half = (x.astype(jnp.bfloat16) for x in (q, k, v))
        out = form(encoding, AttentionInputs(*half, positions, positions, ctx), CONTIGUOUS)
        assert out.dtype == jnp.bfloat16
        errors.append(float(jnp.abs(out.astype(jnp.float32) - exact).max()))
    assert errors[1] < 1.5 * errors[0] + 1e-3


def assert_members_of_a_stack_equal_each_alone(attend):
    encoding, positions = encodings.build("t5", GROUPED, nnx.Rngs(0)), jnp.arange(50)[None]
    graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (3, 2, 50, 4, 8))

    def total(table, q):
        encoding = nnx.merge(graphdef, {"table": table}, constants)
        return attend(encoding, AttentionInputs(q, q, q, positions, positions), CONTIGUOUS).sum()

    tables = params["table"][...] * jnp.arange(1.0, 4)[:, None, None]
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    for i, (of_table, of_q) in enumerate(zip(*jax.vmap(gradient)(tables, x), strict=True)):
        for found, expected in zip((of_table, of_q), gradient(tables[i], x[i]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def lowered_gradient(attend, name, head_dim, dtype, platform, device):
    """The text of the gradients of three stacked runs, lowered for a device, which need not exist on this machine."""
    encoding = encodings.build(name, dataclasses.replace(GROUPED, head_dim=head_dim), nnx.Rngs(0))
    graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)

    def loss(params, q, k, x):
        encoding, positions = nnx.merge(graphdef, params, constants), jnp.arange(100)[None]
        ctx = encoding.prepare(x, positions)
        attention_mask = AttentionMask(window=70, contiguous=True)
        inputs = AttentionInputs(q, k, k, positions, positions, ctx)
        return attend(encoding, inputs, attention_mask).astype(jnp.float32).sum()

    stack = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype))
    q, k = (jax.ShapeDtypeStruct((2, 100, heads, head_dim), dtype) for heads in (4, 2))
    arguments = nnx.to_pure_dict(params), q, k, jax.ShapeDtypeStruct((2, 100, 16), jnp.float32)
    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))
    # Without a device, JAX must know which device to lower for. Older versions have no platform argument.
    device = AbstractDevice(*device[: len(dataclasses.fields(AbstractDevice))])
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        return gradient.trace(*stack(arguments)).lower(lowering_platforms=(platform,)).as_text()


SIZES = pytest.mark.parametrize(
    ("length", "queries", "kv_heads", "attention_mask"),
    [(50, 50, 2, CAUSAL), (90, 61, 1, AttentionMask(window=21))],
    ids=["all", "fewer queries, grouped, window"],
)
