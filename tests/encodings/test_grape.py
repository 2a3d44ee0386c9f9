"""The forms of GRAPE against their definitions, RoPE and ALiBi."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims, masked
from posenc_jax.encodings.bias import alibi_slopes

DIMS = Dims(32, 4, 4, 8, 12)
POSITIONS = jnp.asarray([[0, 1, 3, 4, 5, 8, 9, 10, 11, 15, 16, 20]])


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    return jax.random.normal(keys[0], (2, 12, 32)), *(jax.random.normal(key, (2, 12, 4, 8)) for key in keys[1:])


def softplus(x):
    return np.log1p(np.exp(x))


def bias(encoding):
    x, q, k = inputs()
    logits = masked(jnp.zeros((2, 4, 12, 12)), jnp.tril(jnp.ones((12, 12), bool)))
    return encoding.bias(q, k, logits, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS))


@pytest.mark.parametrize(("weight", "normalize"), [(1.0, True), (0.3, False)])
def test_key_gated_slopes(weight, normalize):
    encoding = encodings.build("grape_a", DIMS, nnx.Rngs(0), weight=weight, normalize=normalize)
    found, k, u = bias(encoding), np.asarray(inputs()[2], np.float64), np.asarray(encoding.u[...], np.float64)
    for h in range(4):
        direction = u[h] / np.linalg.norm(u[h]) if normalize else u[h]
        for i, j in ((0, 0), (5, 2), (11, 0)):
            distance = int(POSITIONS[0, i] - POSITIONS[0, j])
            expected = -distance * alibi_slopes(4)[h] * weight * softplus(k[1, j, h] @ direction / np.sqrt(8))
            np.testing.assert_allclose(found[1, h, i, j], expected, atol=1e-5)


@pytest.mark.parametrize("weight", [1 / math.log(2), 0.5])
def test_a_constant_gate_is_alibi(weight):
    encoding = encodings.build("grape_a", DIMS, nnx.Rngs(0), weight=weight)
    encoding.u[...] = jnp.zeros((4, 8))
    alibi = encodings.build("alibi", DIMS, nnx.Rngs(0)).bias(None, None, None, POSITIONS, POSITIONS, (None, None))
    expected = np.broadcast_to(alibi, (2, 4, 12, 12)) * weight * math.log(2)
    np.testing.assert_allclose(np.tril(bias(encoding)), np.tril(expected), atol=1e-5)


@pytest.mark.parametrize("width", [8, 2])
def test_path_costs_are_summed_between_key_and_query(width):
    encoding = encodings.build("grape_ap", DIMS, nnx.Rngs(0), width=width)
    found, x = bias(encoding), np.asarray(inputs()[0], np.float64)
    p = (x @ np.asarray(encoding.p.kernel[...], np.float64)).reshape(2, 12, 4, width)
    half = width // 2
    for h in range(4):
        for i, j in ((0, 0), (5, 2), (11, 0)):
            expected = 0.0
            for m in range(j + 1, i + 1):
                unit = p[1, m, h] / np.sqrt((p[1, m, h] ** 2).mean())
                turned = (unit[:half] + 1j * unit[half:]) * np.exp(-1j * float(POSITIONS[0, m]))
                cost = p[1, i, h] @ np.concatenate([turned.real, turned.imag]) / width
                expected -= alibi_slopes(4)[h] * softplus(-cost)
            np.testing.assert_allclose(found[1, h, i, j], expected, atol=1e-5)


def turned_logits(encoding, kv_heads=4):
    x, q, k = inputs()
    k = k[:, :, :kv_heads]
    ctx = encoding.prepare(x, POSITIONS)
    q, k = encoding.rotate(q, k, POSITIONS, POSITIONS, ctx)
    return encoding.scores(q, jnp.repeat(k, 4 // kv_heads, axis=2), ctx)


@pytest.mark.parametrize(
    ("kv_heads", "hyperparameters"),
    [
        (4, {}),
        (4, {"base": 50.0, "scale": 2.0}),
        (2, {"per_head": True}),
        (4, {"contextual": True}),
        (2, {"contextual": True, "per_head": True, "base": 30.0}),
    ],
)
def test_rotations_at_learned_rates_by_position_or_phase(kv_heads, hyperparameters):
    encoding = encodings.build("grape_m", Dims(32, 4, kv_heads, 8, 12), nnx.Rngs(0), **hyperparameters)
    offsets = jax.random.normal(jax.random.key(5), encoding.offsets.shape)
    encoding.offsets[...] = offsets
    x, q, k = (np.asarray(array, np.float64) for array in inputs())
    phase = np.broadcast_to(np.asarray(POSITIONS, np.float64), (2, 12))
    if hyperparameters.get("contextual"):
        encoding.gate.kernel[...] = jax.random.normal(jax.random.key(6), (32, 1))
        steps = 1 / (1 + np.exp(-(x @ np.asarray(encoding.gate.kernel[...]) + math.log(math.expm1(1e-3))) / 16))[..., 0]
        phase = np.cumsum(steps, axis=1) - steps
    found = turned_logits(encoding, kv_heads)
    rates = hyperparameters.get("base", 1e4) ** (-np.arange(0, 8, 2) / 8)
    rates = rates * np.exp(np.asarray(offsets, np.float64) / hyperparameters.get("scale", 16.0))
    q, k = q[..., :4] + 1j * q[..., 4:], k[..., :4] + 1j * k[..., 4:]
    for h in range(4):
        group = h * kv_heads // 4
        own = rates[group if len(rates) > 1 else 0]
        for i, j in ((0, 0), (5, 2), (11, 0)):
            turn = np.exp(1j * own * (phase[:, j] - phase[:, i])[:, None])
            expected = (q[:, i, h].conj() * k[:, j, group] * turn).real.sum(axis=-1) / math.sqrt(8)
            np.testing.assert_allclose(found[:, h, i, j], expected, atol=1e-4)


def test_without_offsets_the_rotation_is_ropes_and_the_phase_advances_evenly():
    rope = turned_logits(encodings.build("rope", DIMS, nnx.Rngs(0)))
    np.testing.assert_allclose(turned_logits(encodings.build("grape_m", DIMS, nnx.Rngs(0))), rope, atol=1e-5)
    phase, _ = encodings.build("grape_m", DIMS, nnx.Rngs(0), contextual=True).prepare(inputs()[0], POSITIONS)
    np.testing.assert_allclose(phase[0], 0.3937 * np.arange(12), atol=1e-3)
