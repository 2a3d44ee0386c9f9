"""Sinusoidal and learned embeddings against the equations of their papers."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.encodings.base import Dims


def build(name, d_model, **hyperparameters):
    return encodings.build(name, Dims(d_model, 2, 2, 8, 16), nnx.Rngs(0), **hyperparameters)


@pytest.mark.parametrize(("d_model", "base", "amplitude"), [(32, 1e4, 1.0), (7, 100.0, 0.5)])
def test_sinusoidal_equals_the_paper(d_model, base, amplitude):
    positions = jnp.array([[0, 1, 7, 500]])
    added = build("sinusoidal", d_model, base=base, amplitude=amplitude).embed(jnp.zeros((1, 4, d_model)), positions)
    for row, t in zip(added[0], positions[0], strict=True):
        for c in range(d_model):
            angle = float(t) / base ** ((c - c % 2) / d_model)
            assert row[c] == pytest.approx(amplitude * (math.cos(angle) if c % 2 else math.sin(angle)), abs=1e-4)


def test_learned_adds_the_row_of_the_position():
    encoding = build("learned", 8)
    added = encoding.embed(jnp.zeros((1, 2, 8)), jnp.array([[3, 15]]))
    np.testing.assert_array_equal(added[0], encoding.table[...][jnp.array([3, 15])])


def test_learned_refuses_a_sequence_past_its_table():
    with pytest.raises(ValueError, match="17 positions are beyond the 16"):
        build("learned", 8).embed(jnp.zeros((1, 17, 8)), jnp.arange(17)[None])


def test_learned_position_past_the_table_is_never_another_row():
    added = build("learned", 8).embed(jnp.zeros((1, 1, 8)), jnp.array([[16]]))
    assert jnp.isnan(added).all()
