"""The forget gate against its definition, ALiBi and no encoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.encodings.base import Dims
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
    return dense(encoding, q, k, v, POSITIONS, POSITIONS, encoding.prepare(x, POSITIONS))


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


def test_a_constant_gate_is_alibi():
    slopes = alibi_slopes(4)
    gates = np.exp(-slopes)
    alibi = encodings.build("alibi", DIMS, nnx.Rngs(0))
    np.testing.assert_allclose(attend(with_constant_gate(np.log(gates / (1 - gates)))), attend(alibi), atol=1e-5)


def test_an_open_gate_is_no_encoding():
    none = encodings.build("none", DIMS, nnx.Rngs(0))
    np.testing.assert_allclose(attend(with_constant_gate([40.0] * 4)), attend(none), atol=1e-5)


def test_gates_are_computed_in_float32_whatever_the_input():
    encoding = fox()
    total, _ = encoding.prepare(inputs()[0].astype(jnp.bfloat16), POSITIONS)
    assert total.dtype == jnp.float32
