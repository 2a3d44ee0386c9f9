"""Properties that encodings of the same kind share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import AttentionMask, DistanceBias, full_float32
from tests.small import DIMS


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        *[(name, {}) for name in encodings.names() if issubclass(encodings.load(name), DistanceBias)],
        *[("alibi", {"learned": True}), ("kerple", {"form": "power"}), ("fox_fixed", {"learned": True})],
    ],
)
def test_the_bias_of_a_pair_is_that_of_its_distance(name, hyperparameters):
    encoding = encodings.build(name, DIMS, nnx.Rngs(0), **hyperparameters)
    assert isinstance(encoding, DistanceBias)
    positions = jnp.array([[0, 3, 4, 10, 50, 90], [7, 8, 9, 300, 301, 302]])
    found = encoding.bias(None, None, None, positions, positions, (None, None))
    for row in range(2):
        expected = encoding.distance_bias(positions[row, :, None] - positions[row])
        assert expected.dtype == jnp.float32
        assert jnp.isfinite(expected).all()
        i, j = np.tril_indices(6)
        np.testing.assert_allclose(found[row][:, i, j], expected[:, i, j], rtol=1e-5, atol=1e-4)


def test_a_window_is_refused_where_queries_see_keys_ahead():
    with pytest.raises(ValueError, match="window = 7: must be None if causal = False"):
        AttentionMask(causal=False, window=7)


def test_a_window_without_keys_is_refused():
    with pytest.raises(ValueError, match="window = 0: must be at least 1, or None"):
        AttentionMask(window=0)


def path(encoding, q, ctx):
    digest = encoding.scan_keys(q, ctx[1])
    return encoding.scores(q, q, ctx), encoding.scan_step(
        encoding.scan_init(q), q, q, jnp.ones((8, 8), bool), (ctx[0], digest)
    )


def wall(encoding, q, ctx):
    return encoding.scores(q, q, ctx)


def dynamic_bias(encoding, q, ctx):
    return encoding.distance_bias(q)


@pytest.mark.parametrize("hooks", [path, wall, dynamic_bias], ids=lambda hooks: hooks.__name__)
def test_products_that_rounding_would_spoil_are_in_full_float32_on_every_device(hooks):
    """These are linear solves, decaying gates, and distances in tokens, also in the backward pass."""
    encoding = encodings.build(hooks.__name__, DIMS, nnx.Rngs(0))
    ctx = encoding.prepare(jnp.ones((1, 8, 32)), jnp.arange(8)[None])

    def total(q):
        return sum(x.sum() for x in jax.tree.leaves(hooks(encoding, q, ctx)))

    program = jax.jit(jax.grad(total)).lower(jnp.ones((1, 8, 4, 8))).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_the_precision_of_products_is_restored_after_nested_calls():
    inner = full_float32(lambda: jax.config.jax_default_matmul_precision)
    outer = full_float32(lambda: (inner(), jax.config.jax_default_matmul_precision))
    before = jax.config.jax_default_matmul_precision
    assert outer() == ("highest", "highest")
    assert jax.config.jax_default_matmul_precision == before
