"""xPos against its equation, x-transformers, and RoPE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims

NOTHING = (None, None)


def build(name="xpos", head_dim=16, **hyperparameters):
    return encodings.build(name, Dims(32, 2, 2, head_dim, 64), nnx.Rngs(0), **hyperparameters)


def inputs(length=24, head_dim=16):
    keys = jax.random.split(jax.random.key(0), 2)
    return tuple(jax.random.normal(key, (2, length, 2, head_dim)) for key in keys)


def logits(encoding, q, k, positions):
    return encoding.scores(*encoding.rotate(q, k, positions, positions, NOTHING), NOTHING)


@pytest.mark.parametrize(("base", "scale_base", "gamma"), [(1e4, 512.0, 0.4), (100.0, 20.0, 1.5)])
def test_logits_equal_the_equation(base, scale_base, gamma):
    q, k = inputs()
    found = logits(build(base=base, scale_base=scale_base, gamma=gamma), q, k, 3 * jnp.arange(24)[None] + 7)
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    q, k = q[..., :8] + 1j * q[..., 8:], k[..., :8] + 1j * k[..., 8:]
    for i, j in ((0, 0), (5, 2), (23, 0), (23, 22)):
        expected = 0
        for m in range(8):
            zeta = (2 * m / 16 + gamma) / (1 + gamma)
            turn = np.exp(1j * 3 * (j - i) * base ** (-2 * m / 16))
            expected += zeta ** (3 * (i - j) / scale_base) * (q[:, i, :, m].conj() * k[:, j, :, m] * turn).real
        np.testing.assert_allclose(found[:, :, i, j], expected / 4, atol=3e-5)


@pytest.mark.torch
@pytest.mark.parametrize(("base", "scale_base"), [(10000, 512), (500, 30)])
def test_equals_x_transformers_forward_and_backward(base, scale_base):
    theirs = pytest.importorskip("x_transformers.x_transformers")
    torch = pytest.importorskip("torch")
    q, k = inputs()
    worth = np.tril(np.random.default_rng(0).normal(size=(2, 2, 24, 24))).astype(np.float32)

    def total(q, k):
        z = logits(build(base=float(base), scale_base=float(scale_base)), q, k, jnp.arange(24)[None])
        return (jnp.tril(z) * worth).sum(), z

    (_, found), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(q, k)
    interleaved = np.arange(16).reshape(2, 8).T.ravel()  # x-transformers pairs neighbouring channels
    q, k = (torch.tensor(np.array(x[..., interleaved]).swapaxes(1, 2), requires_grad=True) for x in (q, k))
    frequencies, scale = theirs.RotaryEmbedding(16, use_xpos=True, base=base, scale_base=scale_base)(torch.arange(24))
    rotated = (
        theirs.apply_rotary_pos_emb(q, frequencies, scale),
        theirs.apply_rotary_pos_emb(k, frequencies, scale**-1),
    )
    expected = rotated[0] @ rotated[1].transpose(-1, -2) / 4
    (expected.tril() * torch.tensor(worth)).sum().backward()
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5)
    for ours, x in zip(gradients, (q, k), strict=True):
        np.testing.assert_allclose(ours[..., interleaved], x.grad.numpy().swapaxes(1, 2), atol=1e-4)


def test_an_endless_scale_base_is_rope():
    q, k = inputs()
    positions = jnp.arange(24)[None]
    endless = logits(build(scale_base=1e12), q, k, positions)
    np.testing.assert_allclose(endless, logits(build("rope"), q, k, positions), atol=1e-5)


@pytest.mark.parametrize("offset", [1000, 1_000_000])
def test_logits_depend_on_distance_only_however_far_out(offset):
    encoding = build()
    encoding.inverse_frequencies[...] = jnp.zeros(8)  # only the decay: at large positions, float32 rounds the angles
    q, k = inputs()
    positions = 40 * jnp.arange(24)[None]
    moved = logits(encoding, q, k, positions + offset)
    np.testing.assert_allclose(logits(encoding, q, k, positions), moved, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", [2_000, 100_000])
def test_logits_the_query_may_see_are_finite_far_out(spacing):
    q, k = inputs()
    positions = spacing * jnp.arange(24)[None]
    assert jnp.isfinite(jnp.tril(logits(build(), q, k, positions))).all()


def test_rows_of_a_batch_have_centres_of_their_own():
    q, k = inputs()
    positions = jnp.stack([jnp.arange(24), 5 * jnp.arange(24) + 300])
    both = build().rotate(q, k, positions, positions, NOTHING)
    for row in range(2):
        one = slice(row, row + 1)
        alone = build().rotate(q[one], k[one], positions[one], positions[one], NOTHING)
        for found, expected in zip(both, alone, strict=True):
            np.testing.assert_allclose(found[one], expected, atol=1e-5)
