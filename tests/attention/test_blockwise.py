"""Blockwise attention equals dense attention, in value and in every gradient, and needs memory linear in the length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.dense import dense
from posenc_jax.attention.layer import algorithm
from posenc_jax.encodings.base import Dims, Encoding, Sight

DIMS = Dims(d_model=16, num_heads=2, num_kv_heads=2, head_dim=8, max_length=64)
BLOCKWISE = [
    name for name in encodings.names() if algorithm(encodings.build(name, DIMS, nnx.Rngs(0)), 10**6) is blockwise
]


def loss(attend, name, arrays, queries):
    """A scalar of the attention of the last queries to all keys, from arrays that are differentiated."""
    params, q, k, v, x = arrays
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    graphdef, _, constants = nnx.split(encoding, nnx.Param, ...)
    encoding = nnx.merge(graphdef, params, constants)
    positions = jnp.arange(k.shape[1])[None]
    ctx = encoding.prepare(x, positions)
    ctx = jax.tree.map(lambda leaf: leaf[:, -queries:], ctx[0]), ctx[1]
    out = attend(encoding, q[:, -queries:], k, v, positions[:, -queries:], positions, ctx)
    return jnp.sin(out.astype(jnp.float32)).sum(), out


def random_arrays(name, length, dtype=jnp.float32):
    params = nnx.to_pure_dict(nnx.state(encodings.build(name, DIMS, nnx.Rngs(0)), nnx.Param))
    keys = jax.random.split(jax.random.key(1), 4)
    qkv = (jax.random.normal(key, (2, length, 2, 8)).astype(dtype) for key in keys[:3])
    return params, *qkv, jax.random.normal(keys[3], (2, length, 16))


@pytest.mark.parametrize("name", BLOCKWISE)
@pytest.mark.parametrize(
    ("length", "queries", "block"),
    [(50, 50, 16), (100, 100, 16), (100, 37, 16), (40, 40, 64), (90, 1, 16)],
    ids=["written out", "loops", "fewer queries than keys", "one block", "one query"],
)
def test_blockwise_equals_dense_in_value_and_every_gradient(name, length, queries, block):
    arrays = random_arrays(name, length)
    value = jax.value_and_grad(loss, argnums=2, has_aux=True)
    (_, expected), expected_gradients = value(dense, name, arrays, queries)
    (_, found), gradients = value(functools.partial(blockwise, block=block), name, arrays, queries)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, expected_gradients)


@pytest.mark.parametrize("sight", [*(Sight(window=n) for n in (1, 7, 16, 40, 1000)), Sight(causal=False)], ids=str)
@pytest.mark.parametrize("queries", [100, 37])
def test_blockwise_equals_dense_under_a_window_and_with_keys_ahead(sight, queries):
    arrays = random_arrays("t5", 100)
    value = jax.value_and_grad(loss, argnums=2, has_aux=True)
    (_, expected), expected_gradients = value(functools.partial(dense, sight=sight), "t5", arrays, queries)
    (_, found), gradients = value(functools.partial(blockwise, sight=sight, block=16), "t5", arrays, queries)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradients, expected_gradients)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_bfloat16_is_as_close_to_float32_as_dense_is(name):
    exact = loss(dense, name, random_arrays(name, 100), 100)[1]
    arrays = random_arrays(name, 100, jnp.bfloat16)
    errors = [
        float(jnp.abs(loss(attend, name, arrays, 100)[1].astype(jnp.float32) - exact).max())
        for attend in (dense, functools.partial(blockwise, block=16))
    ]
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_blocks_ahead_of_the_queries_are_not_visited():
    """A key of a block that must be skipped is made infinite: had it been multiplied, even by zero, NaN would show."""
    arrays = list(random_arrays("none", 100))
    arrays[2] = arrays[2].at[:, 96:].set(jnp.inf)
    out = loss(functools.partial(blockwise, block=16), "none", arrays, 100)[1]
    assert jnp.isfinite(out[:, :96]).all()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_memory_grows_linearly_with_the_length(name):
    def temporary_bytes(length):
        arrays = jax.eval_shape(lambda: random_arrays(name, length))
        gradient = jax.grad(lambda arrays: loss(blockwise, name, arrays, length)[0])
        return jax.jit(gradient).lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 2.3 * temporary_bytes(4096)


def test_hooks_that_need_all_logits_are_given_them():
    class Own(Encoding):
        def weights(self, logits, mask):
            return jax.nn.sigmoid(logits) * mask

    class Wide(Encoding):
        blockwise = False

    for cls in (Own, Wide):
        assert algorithm(cls(cls.Config(), DIMS, nnx.Rngs(0)), 10**6) is dense
    assert algorithm(Encoding(Encoding.Config(), DIMS, nnx.Rngs(0)), 10**6) is blockwise
