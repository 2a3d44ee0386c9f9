"""PaTH against the explicit product of its matrices, no encoding, and the forget gate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.encodings.base import AttentionInputs, Dims
from posenc_jax.encodings.gated import solve_unit_lower

POSITIONS = jnp.arange(12)[None]


def path(kv_heads=4, **hyperparameters):
    return encodings.build("path", Dims(32, 4, kv_heads, 8, 12), nnx.Rngs(0), **hyperparameters)


def inputs(kv_heads=4):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 12, 32))
    return x, *(jax.random.normal(key, (2, 12, n, 8)) for key, n in zip(keys[1:], (4, kv_heads, kv_heads), strict=True))


def attend(encoding):
    x, q, k, v = inputs()
    return dense(encoding, AttentionInputs(q, k, v, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS)))


def without_reflections(encoding):
    encoding.beta.kernel[...] = jnp.zeros((32, 4))
    encoding.beta.bias[...] = jnp.full((4,), -60.0)
    return encoding


def directions(encoding, x, heads, taps):
    """w and beta in float64, computed one token after another."""
    down, up, beta = (np.asarray(a[...], np.float64) for a in (encoding.down.kernel, encoding.up.kernel, encoding.conv))
    low, kernel = x @ down @ up, beta
    w = np.zeros_like(low)
    for t in range(x.shape[1]):
        for n in range(taps):
            if t - n >= 0:
                w[:, t] += kernel[taps - 1 - n] * low[:, t - n]
    w = (w / (1 + np.exp(-w))).reshape(*x.shape[:2], heads, 8)
    gates = x @ np.asarray(encoding.beta.kernel[...], np.float64) + np.asarray(encoding.beta.bias[...], np.float64)
    return w / np.linalg.norm(w, axis=-1, keepdims=True), 2 / (1 + np.exp(-gates))


@pytest.mark.parametrize(("rank", "taps", "kv_heads"), [(32, 3, 4), (5, 2, 2)])
def test_scores_are_the_product_of_reflections_between(rank, taps, kv_heads):
    encoding = path(kv_heads, rank=rank, conv_width=taps)
    x, q, k, _ = inputs(kv_heads)
    k = jnp.repeat(k, 4 // kv_heads, axis=2)
    found = jax.jit(lambda x, q, k: encoding.scores(q, k, encoding.prepare(x, POSITIONS)))(x, q, k)
    w, beta = directions(encoding, np.asarray(x, np.float64), kv_heads, taps)
    for h in range(4):
        of = h // (4 // kv_heads)
        for i, j in ((0, 0), (4, 3), (11, 0), (9, 2)):
            key = np.asarray(k[0, j, h], np.float64)
            for t in range(j + 1, i + 1):
                key = key - beta[0, t, of] * w[0, t, of] * (w[0, t, of] @ key)
            np.testing.assert_allclose(found[0, h, i, j], np.asarray(q[0, i, h]) @ key / np.sqrt(8), atol=1e-4)


def test_without_reflections_it_is_no_encoding():
    none = encodings.build("none", Dims(32, 4, 4, 8, 12), nnx.Rngs(0))
    np.testing.assert_allclose(attend(without_reflections(path())), attend(none), atol=1e-5)


@pytest.mark.parametrize(("gate", "scale"), [("added", 1.0), ("scaled", 8**-0.5)])
def test_the_forget_gate_is_added_to_the_logits(gate, scale):
    encoding = path(forget_gate=gate)
    fox = encodings.build("fox", Dims(32, 4, 4, 8, 12), nnx.Rngs(0))
    fox.gate.kernel[...], fox.gate.bias[...] = encoding.gate.kernel[...], encoding.gate.bias[...]
    x, q, *_ = inputs()
    expected = fox.bias(None, None, None, POSITIONS, POSITIONS, fox.prepare(x, POSITIONS)) * scale
    found = encoding.bias(q, None, None, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if gate == "added":
        np.testing.assert_allclose(attend(without_reflections(encoding)), attend(fox), atol=1e-5)


@pytest.mark.parametrize(("size", "columns"), [(5, 3), (16, 16), (50, 50)])
def test_the_solve_equals_numpys_in_value_and_gradient(size, columns):
    """The matrices are products of unit vectors times 2, as in PaTH: reflections, whose inverses have the same size."""
    keys = jax.random.split(jax.random.key(0), 2)
    w = jax.random.normal(keys[0], (3, size, 8))
    w = w / jnp.linalg.norm(w, axis=-1, keepdims=True)
    matrix, right = 2 * w @ w.swapaxes(1, 2), jax.random.normal(keys[1], (3, size, columns))

    def expected(matrix):
        return jnp.linalg.solve(jnp.eye(size) + jnp.tril(matrix, -1), right)

    def value_and_gradient(solve):
        value, pull_back = jax.vjp(solve, matrix)
        return value, *pull_back(2 * value)  # the gradient of the sum of squares

    values, gradients = zip(
        value_and_gradient(expected),
        jax.jit(lambda: value_and_gradient(lambda m: solve_unit_lower(m, right)))(),
        strict=True,
    )
    np.testing.assert_allclose(*values, atol=2e-4)
    np.testing.assert_allclose(*gradients, atol=1e-4 * jnp.abs(gradients[0]).max())


def test_xlas_triangular_solve_is_not_called():
    """With it, a training step on the CPU did not return."""
    encoding, (x, q, k, _) = path(), inputs()
    program = jax.make_jaxpr(lambda x, q, k: encoding.scores(q, k, encoding.prepare(x, POSITIONS)))(x, q, k)
    assert "dot_general" in str(program)
    assert "triangular_solve" not in str(program)
