"""PoPE against its equation and x-transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims

NOTHING = (None, None)


def build(num_kv_heads=4, **hyperparameters):
    return encodings.build("pope", Dims(32, 4, num_kv_heads, 8, 64), nnx.Rngs(0), **hyperparameters)


def inputs(num_kv_heads=4):
    keys = jax.random.split(jax.random.key(0), 2)
    return tuple(jax.random.normal(key, (2, 20, heads, 8)) for key, heads in zip(keys, (4, num_kv_heads), strict=True))


def logits(encoding, q, k, positions):
    q, k = encoding.rotate(q, k, positions, positions, NOTHING)
    return encoding.scores(q, jnp.repeat(k, q.shape[2] // k.shape[2], axis=2), NOTHING)


@pytest.mark.parametrize(("base", "initial"), [(1e4, "zero"), (100.0, "uniform")])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_logits_equal_the_equation_with_a_delta_for_each_query_head(base, initial, num_kv_heads):
    encoding = build(num_kv_heads, base=base, initial=initial)
    q, k = inputs(num_kv_heads)
    found = logits(encoding, q, k, 3 * jnp.arange(20)[None] + 5)
    delta = np.asarray(encoding.delta[...], np.float64)
    q, k = (np.log1p(np.exp(np.asarray(x, np.float64))) for x in (q, k))
    for i, j in ((0, 0), (7, 3), (19, 0)):
        for h in range(4):
            expected = 0
            for c in range(8):
                angle = 3 * (j - i) * base ** (-c / 8) + delta[h, c]
                expected += q[:, i, h, c] * k[:, j, h * num_kv_heads // 4, c] * math.cos(angle)
            np.testing.assert_allclose(found[:, h, i, j], expected / math.sqrt(8), atol=3e-5)


@pytest.mark.torch
def test_equals_x_transformers_forward_and_backward():
    theirs = pytest.importorskip("x_transformers.x_transformers")
    torch = pytest.importorskip("torch")
    q, k = inputs()
    # Within the range, at its bounds, and beyond them.
    delta = np.random.default_rng(0).uniform(-2 * math.pi - 1, 1, (4, 8)).astype(np.float32)
    delta[0, 0], delta[1, 1] = 0, -2 * math.pi
    assert (delta > 0).any()
    worth = np.random.default_rng(1).normal(size=(2, 4, 20, 20)).astype(np.float32)

    def total(q, k, delta):
        encoding = build()
        encoding.delta[...] = delta
        z = logits(encoding, q, k, jnp.arange(20)[None])
        return (z * worth).sum(), z

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, jnp.asarray(delta))
    polar = theirs.PolarEmbedding(8, 4)
    polar.learned_bias.data = torch.tensor(delta)[:, None]
    frequencies, bias = polar(torch.arange(20))
    q, k = (torch.tensor(np.array(x).swapaxes(1, 2), requires_grad=True) for x in (q, k))
    expected = theirs.apply_polar_pos_emb(q, frequencies) @ theirs.apply_polar_pos_emb(k, frequencies + bias).mT
    expected = expected / math.sqrt(8)
    (expected * torch.tensor(worth)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=5e-5)
    for ours, x in zip(gradients[:2], (q, k), strict=True):
        np.testing.assert_allclose(ours, x.grad.numpy().swapaxes(1, 2), atol=1e-4)
    np.testing.assert_allclose(gradients[2], polar.learned_bias.grad[:, 0].numpy(), atol=1e-3)


def test_delta_acts_only_within_its_range():
    q, k = inputs()
    positions = jnp.arange(20)[None]
    found = []
    for value in (0.0, 5.0, -2 * math.pi, -10.0):
        encoding = build()
        encoding.delta[...] = jnp.full((4, 8), value)
        found.append(logits(encoding, q, k, positions))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2], found[3])


def test_uniform_deltas_fill_the_range():
    delta = build(initial="uniform").delta[...]
    assert -2 * math.pi <= delta.min() < -5
    assert -1.2 < delta.max() <= 0


def test_queries_and_keys_are_twice_as_wide_and_keep_their_dtype():
    q, k = (x.astype(jnp.bfloat16) for x in inputs(2))
    positions = jnp.arange(20)[None] + 3001
    low = build(2).rotate(q, k, positions, positions, NOTHING)
    assert [x.shape[-1] for x in low] == [16, 16]
    assert [x.dtype for x in low] == [jnp.bfloat16] * 2
    full = build(2).rotate(q.astype(jnp.float32), k.astype(jnp.float32), positions, positions, NOTHING)
    for found, expected in zip(low, full, strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.03)
