"""The forget gate against its definition, ALiBi, and no encoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.encodings.base import AttentionInputs, Dims
from posenc_jax.encodings.bias import alibi_slopes

DIMS = Dims(32, 4, 4, 8, 32)
POSITIONS = jnp.arange(32)[None]


def fox(**hyperparameters):
    return encodings.build("fox", DIMS, nnx.Rngs(0), **hyperparameters)


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    return jax.random.normal(keys[0], (2, 32, 32)), *(jax.random.normal(key, (2, 32, 4, 8)) for key in keys[1:])


def attend(encoding):
    x, q, k, v = inputs()
    return dense(encoding, AttentionInputs(q, k, v, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS)))


def with_constant_gate(logits):
    encoding = fox()
    encoding.gate.kernel[...] = jnp.zeros((32, 4))
    encoding.gate.bias[...] = jnp.asarray(logits, jnp.float32)
    return encoding


@pytest.mark.parametrize("bias_init", [0.0, 2.0])
def test_bias_is_the_sum_of_log_gates_between(bias_init):
    encoding = fox(bias_init=bias_init)
    x = inputs()[0]
    found = encoding.bias(None, None, None, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS))
    w, b = np.asarray(encoding.gate.kernel[...], np.float64), np.asarray(encoding.gate.bias[...], np.float64)
    gates = 1 / (1 + np.exp(-(np.asarray(x, np.float64) @ w + b)))
    for i, j in ((0, 0), (5, 2), (31, 0)):
        np.testing.assert_allclose(found[:, :, i, j], np.log(gates[:, j + 1 : i + 1]).sum(axis=1), atol=1e-4)


@pytest.mark.parametrize("max_exponent", [8.0, 2.0])
def test_a_constant_gate_is_alibi(max_exponent):
    gates = np.exp(-alibi_slopes(4, max_exponent))
    alibi = encodings.build("alibi", DIMS, nnx.Rngs(0), max_exponent=max_exponent)
    np.testing.assert_allclose(attend(with_constant_gate(np.log(gates / (1 - gates)))), attend(alibi), atol=1e-5)


def test_an_open_gate_is_no_encoding():
    none = encodings.build("none", DIMS, nnx.Rngs(0))
    np.testing.assert_allclose(attend(with_constant_gate([40.0] * 4)), attend(none), atol=1e-5)


def test_gates_are_computed_in_float32_whatever_the_input():
    encoding = fox()
    total, _ = encoding.prepare(inputs()[0].astype(jnp.bfloat16), POSITIONS)
    assert total.dtype == jnp.float32


@pytest.mark.parametrize(("shortest", "longest"), [(2.0, 1024.0), (5.0, 50.0)])
def test_fixed_gates_are_alibi_with_slopes_of_one_over_the_times(shortest, longest):
    encoding = encodings.build("fox_fixed", DIMS, nnx.Rngs(0), shortest=shortest, longest=longest)
    times = np.exp(np.linspace(np.log(shortest), np.log(longest), 4))
    alibi = encodings.build("alibi", DIMS, nnx.Rngs(0))
    alibi.slopes[...] = jnp.asarray(1 / times, jnp.float32)
    np.testing.assert_allclose(attend(encoding), attend(alibi), atol=1e-5)


def test_only_learned_fixed_gates_are_parameters():
    for learned in (False, True):
        encoding = encodings.build("fox_fixed", DIMS, nnx.Rngs(0), learned=learned)
        assert len(jax.tree.leaves(nnx.state(encoding, nnx.Param))) == int(learned)


@pytest.mark.parametrize("bias_init", [8.0, 0.0])
def test_wall_fades_each_channel_by_the_gates_between(bias_init):
    encoding = encodings.build("wall", DIMS, nnx.Rngs(0), bias_init=bias_init)
    x, q, k, _ = inputs()
    found = encoding.scores(q, k, encoding.prepare(x, POSITIONS))
    w, b = (np.asarray(a[...], np.float64) for a in (encoding.channels.kernel, encoding.channels.bias))
    gates = (1 / (1 + np.exp(-(np.asarray(x, np.float64) @ w + b)))).reshape(2, 32, 4, 8)
    for i, j in ((0, 0), (5, 2), (31, 0), (20, 17), (16, 15), (31, 30)):
        expected = (np.asarray(q)[:, i] * np.asarray(k)[:, j] * gates[:, j + 1 : i + 1].prod(axis=1)).sum(-1)
        np.testing.assert_allclose(found[:, :, i, j], expected / np.sqrt(8), atol=1e-4)


def test_wall_with_open_gates_is_no_encoding_and_with_a_scalar_gate_forgets():
    none, forgetting = encodings.build("none", DIMS, nnx.Rngs(0)), fox()
    for forget_gate, expected in ((False, none), (True, forgetting)):
        encoding = encodings.build("wall", DIMS, nnx.Rngs(0), forget_gate=forget_gate)
        encoding.channels.kernel[...], encoding.channels.bias[...] = jnp.zeros((32, 32)), jnp.full((32,), 60.0)
        if forget_gate:
            encoding.gate.kernel[...], encoding.gate.bias[...] = forgetting.gate.kernel[...], forgetting.gate.bias[...]
        np.testing.assert_allclose(attend(encoding), attend(expected), atol=1e-5)


def test_wall_is_stable_where_the_sum_of_log_gates_is_large():
    encoding = encodings.build("wall", DIMS, nnx.Rngs(0), bias_init=-60.0)
    x, q, k, _ = inputs()
    ctx = encoding.prepare(x, POSITIONS)
    loss = lambda q, k, ctx: (jnp.tril(encoding.scores(q, k, ctx)) ** 2).sum()  # noqa: E731
    found = jnp.tril(encoding.scores(q, k, ctx))
    own = (q * k).sum(-1).swapaxes(1, 2)[..., None] / np.sqrt(8) * jnp.eye(32)
    np.testing.assert_allclose(found, own, atol=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss, (0, 1, 2))(q, k, ctx)))


@pytest.mark.torch
def test_fox_and_its_gradients_equal_x_transformers():
    torch = pytest.importorskip("torch")
    original = pytest.importorskip("x_transformers.x_transformers").DataDependentAlibi(32, 4, bias_init=1.0)
    encoding, x = fox(), inputs()[0]
    linear = original.to_forget_gates[0]
    encoding.gate.kernel[...] = jnp.asarray(linear.weight.detach().numpy().T)
    encoding.gate.bias[...] = jnp.asarray(linear.bias.detach().numpy())
    theirs = torch.tensor(np.asarray(x), requires_grad=True)
    expected = original(theirs)
    worth = np.tril(np.random.default_rng(0).normal(size=expected.shape)).astype(np.float32)
    (expected * torch.tensor(worth)).sum().backward()

    def bias(x):
        return encoding.bias(None, None, None, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS))

    np.testing.assert_allclose(bias(x), expected.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(jax.grad(lambda x: (bias(x) * worth).sum())(x), theirs.grad.numpy(), atol=1e-3)
