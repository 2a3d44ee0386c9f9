"""The kernels, interpreted, equal dense attention in value and in every gradient; and they lower for a GPU."""

import functools
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.attention.kernel import kernel, runs
from posenc_jax.encodings.base import Dims, Encoding, Sight
from tests.attention.rows import assert_skips_blocks_ahead, assert_skips_blocks_before_the_window

DIMS = Dims(d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
CAUSAL = Sight(contiguous=True)
HEADS = jnp.zeros((2, 50, 4, 8))
NAMES = [name for name in encodings.names() if runs(encodings.build(name, DIMS, nnx.Rngs(0)), HEADS, HEADS, CAUSAL)]

interpreted = functools.partial(kernel, block=16, interpret=True)


def compare(name, length, queries, sight=CAUSAL, positions=None, **hyperparameters):
    """Both algorithms on the last queries and all keys: outputs and gradients of all arrays must agree."""
    encoding = encodings.build(name, DIMS, nnx.Rngs(0), **hyperparameters)
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
        out = attend(encoding, q[:, -queries:], k, v, positions[:, -queries:], positions, ctx, sight)
        return jnp.sin(out).sum(), out

    value = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    (_, expected), expected_gradients = value(dense, arrays)
    (_, found), gradients = value(interpreted, arrays)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, expected_gradients)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_equals_dense_in_value_and_every_gradient(name):
    compare(name, 50, 50)


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [("alibi", {"learned": True}), ("fox_fixed", {"learned": True}), ("kerple", {"form": "power"})],
)
def test_kernel_equals_dense_where_rates_are_learned(name, hyperparameters):
    compare(name, 50, 50, **hyperparameters)


@pytest.mark.parametrize("name", ["t5", "fire"])
@pytest.mark.parametrize(
    ("length", "queries"),
    [(64, 64), (12, 12), (75, 37), (70, 1), (64, 16)],
    ids=["whole blocks", "less than a block", "fewer queries than keys", "one query", "whole blocks of fewer queries"],
)
def test_kernel_equals_dense_at_any_lengths(name, length, queries):
    compare(name, length, queries)


@pytest.mark.parametrize("window", [1, 7, 16, 17, 40, 1000])
@pytest.mark.parametrize("queries", [75, 37])
def test_kernel_equals_dense_under_a_window(queries, window):
    compare("t5", 75, queries, Sight(window=window, contiguous=True))


@pytest.mark.parametrize("queries", [50, 20])
def test_kernel_equals_dense_with_keys_ahead(queries):
    compare("rope", 50, queries, Sight(causal=False))


@pytest.mark.parametrize("name", ["fire", "grape_a"])
def test_pairwise_biases_follow_positions_that_are_not_contiguous(name):
    positions = jnp.cumsum(jax.random.uniform(jax.random.key(2), (2, 50), minval=0.5, maxval=9), axis=1)
    compare(name, 50, 50, Sight(), positions)


@pytest.mark.parametrize("name", ["none", "t5", "fire", "fox", "grape_a"])
def test_bfloat16_is_as_close_to_float32_as_dense_is(name):
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    keys, positions = jax.random.split(jax.random.key(1), 4), jnp.arange(50)[None]
    q, k, v = (jax.random.normal(key, (2, 50, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=False))
    ctx = encoding.prepare(jax.random.normal(keys[3], (2, 50, 16)), positions)
    exact = dense(encoding, q, k, v, positions, positions, ctx, CAUSAL)
    errors = []
    for attend in (dense, interpreted):
        half = (x.astype(jnp.bfloat16) for x in (q, k, v))
        out = attend(encoding, *half, positions, positions, ctx, CAUSAL)
        assert out.dtype == jnp.bfloat16
        errors.append(float(jnp.abs(out.astype(jnp.float32) - exact).max()))
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_blocks_that_no_query_sees_are_not_read():
    assert_skips_blocks_ahead(interpreted, "t5")
    assert_skips_blocks_before_the_window(interpreted, "t5")


def test_members_of_a_stack_equal_each_alone():
    encoding, positions = encodings.build("t5", DIMS, nnx.Rngs(0)), jnp.arange(50)[None]
    graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (3, 2, 50, 4, 8))

    def attend(table, q):
        encoding = nnx.merge(graphdef, {"table": table}, constants)
        return interpreted(encoding, q, q, q, positions, positions, (None, None), CAUSAL).sum()

    tables = params["table"][...] * jnp.arange(1.0, 4)[:, None, None]
    gradient = jax.jit(jax.grad(attend, argnums=(0, 1)))
    for i, (of_table, of_q) in enumerate(zip(*jax.vmap(gradient)(tables, x), strict=True)):
        for found, expected in zip((of_table, of_q), gradient(tables[i], x[i]), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # from jax 0.12 on
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        *((name, 64, jnp.bfloat16) for name in ("none", "alibi", "kerple", "t5", "fire", "fox", "grape_a")),
        ("t5", 20, jnp.float32),
        ("t5", 256, jnp.bfloat16),
    ],
)
def test_kernels_lower_for_a_gpu(name, head_dim, dtype):
    """Forward and backward become programs of Triton here, without a GPU; with stacked members too."""
    dims = replace(DIMS, head_dim=head_dim)
    encoding = encodings.build(name, dims, nnx.Rngs(0))
    graphdef, params, constants = nnx.split(encoding, nnx.Param, ...)

    def loss(params, q, k, x):
        encoding, positions = nnx.merge(graphdef, params, constants), jnp.arange(100)[None]
        ctx = encoding.prepare(x, positions)
        sight = Sight(window=70, contiguous=True)
        return kernel(encoding, q, k, k, positions, positions, ctx, sight).astype(jnp.float32).sum()

    stack = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype))
    q, k = (jax.ShapeDtypeStruct((2, 100, heads, head_dim), dtype) for heads in (4, 2))
    arguments = nnx.to_pure_dict(params), q, k, jax.ShapeDtypeStruct((2, 100, 16), jnp.float32)
    gradient = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))
    # From 0.12 on, JAX has to be told which GPU it lowers for where there is none.
    device = AbstractDevice(*("NVIDIA H100 80GB HBM3", 132, "gpu")[: len(fields(AbstractDevice))])  # older: no platform
    with use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device)):
        text = gradient.trace(*stack(arguments)).lower(lowering_platforms=("cuda",)).as_text()
    kernels = ["output", "gradient_of_queries", "gradient_of_keys"]
    if name in ("kerple", "t5"):
        kernels.append("gradient_of_distances")
    assert all(f"attention_{kernel}" in text for kernel in kernels)


def test_kernels_run_what_changes_logits_by_a_bias_that_they_know():
    class Own(Encoding):
        def weights(self, logits, mask):
            return jax.nn.sigmoid(logits) * mask

    class Unknown(Encoding):
        def bias(self, q, k, logits, q_pos, k_pos, ctx):
            return logits

    assert set(NAMES) >= {
        "rope",
        "alibi",
        "kerple",
        "sandwich",
        "t5",
        "fire",
        "dynamic_bias",
        "fox",
        "fox_fixed",
        "grape_a",
    }
    for cls in (Own, Unknown):
        assert not runs(cls(cls.Config(), DIMS, nnx.Rngs(0)), HEADS, HEADS, CAUSAL)
    none, t5, fire = (encodings.build(name, DIMS, nnx.Rngs(0)) for name in ("none", "t5", "fire"))
    assert all(runs(encoding, HEADS, HEADS, CAUSAL) for encoding in (none, t5, fire))
    assert runs(fire, HEADS, HEADS, Sight())
    assert not runs(t5, HEADS, HEADS, Sight())  # positions may not be contiguous
    assert not runs(t5, HEADS, HEADS, Sight(causal=False, contiguous=True))
    wide = jnp.zeros((2, 50, 4, 132))
    assert not runs(none, wide, HEADS, CAUSAL)
    assert not runs(none, HEADS, wide, CAUSAL)
