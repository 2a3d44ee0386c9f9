"""Terms of logits: their sum, their invariance to shifts of positions, and their agreement with the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.recurrence import addition
from posenc_jax import encodings
from tests.small import DIMS, tokens, transformer

PLACES = jnp.arange(20)


def kernels(seed, width=32):
    keys = jax.random.split(jax.random.key(seed))
    return addition.Projections(*(jax.random.normal(key, (width, 4, 8)) / np.sqrt(width) for key in keys))


def embeddings():
    sinusoidal = encodings.build("sinusoidal", DIMS, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (20, 32))
    return x, lambda shift: addition.positional_embeddings(sinusoidal, PLACES + shift, 32)


def test_positional_embeddings_are_sines_and_cosines_of_the_position():
    p = embeddings()[1](3)
    angles = (np.arange(20) + 3)[:, None] * 10000.0 ** (-np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(p[:, ::2], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(p[:, 1::2], np.cos(angles), atol=1e-5)


def test_the_four_terms_add_up_to_the_product_of_sums():
    x, p = embeddings()
    own = kernels(1)
    q, k = (jnp.einsum("tc,chd->thd", x + p(0), kernel) for kernel in own)
    expected = jnp.einsum("thd,shd->hts", q, k) / np.sqrt(8)
    terms = addition.addition_terms(x, p(0), own)
    np.testing.assert_allclose(terms.sum(axis=0), expected, atol=1e-4)
    np.testing.assert_allclose(terms[0], addition.addition_terms(x, 0 * x, own).sum(axis=0), atol=1e-6)


def test_concatenation_has_kernels_of_its_own_and_is_addition_where_they_are_equal():
    x, p = embeddings()
    both = addition.Projections(*(jnp.concatenate(pair) for pair in zip(kernels(1), kernels(2), strict=True)))
    beside = jnp.concatenate([x, p(0)], axis=1)
    q, k = (jnp.einsum("tc,chd->thd", beside, kernel) for kernel in both)
    found = addition.addition_terms(x, p(0), kernels(1), kernels(2)).sum(axis=0)
    np.testing.assert_allclose(found, jnp.einsum("thd,shd->hts", q, k) / np.sqrt(8), atol=1e-4)
    np.testing.assert_array_equal(
        addition.addition_terms(x, p(0), kernels(1), kernels(1)),
        addition.addition_terms(x, p(0), kernels(1)),
    )


def test_only_a_rotation_depends_on_distance_alone():
    x, p = embeddings()
    added = [addition.addition_terms(x, p(shift), kernels(1)) for shift in (0, 1000)]
    assert addition.relative_change(added[0].sum(axis=0), added[1].sum(axis=0)) > 0.1
    assert addition.relative_change(added[0][0], added[1][0]) == 0
    assert addition.relative_change(added[0][3], added[1][3]) > 0.1
    rope = encodings.build("rope", DIMS, nnx.Rngs(0))
    turned = [addition.rotated_logits(x, PLACES + shift, kernels(1), rope) for shift in (0, 1000)]
    assert addition.relative_change(*turned) < 1e-4
    assert addition.relative_change(turned[0], addition.rotated_logits(x, 2 * PLACES, kernels(1), rope)) > 0.1


def test_the_product_of_two_positions_depends_on_distance_where_the_projection_is_the_identity():
    x, p = embeddings()
    identity = addition.Projections(*[jnp.eye(32).reshape(32, 1, 32)] * 2)
    terms = [addition.addition_terms(x, p(shift), identity) for shift in (0, 1000)]
    assert addition.relative_change(terms[0][3], terms[1][3]) < 1e-3
    assert addition.relative_change(terms[0][1], terms[1][1]) > 0.1
    np.testing.assert_allclose(np.diag(terms[0][3][0], -3), terms[0][3][0][3, 0], atol=1e-4)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_terms_of_a_model_add_up_to_its_first_layers_logits(num_kv_heads):
    model = transformer("sinusoidal", num_kv_heads=num_kv_heads)
    model.block(0).attention_norm.scale[...] = jnp.linspace(0.5, 2, 32)
    text, places = tokens(1, 20)[0], PLACES + 7
    terms = addition.first_layer_terms(model, text, places)
    np.testing.assert_allclose(terms.sum(axis=0), addition.first_layer_logits(model, text, places), atol=1e-4)


def test_logits_of_the_first_layer_are_those_that_attention_takes():
    model, text = transformer("rope"), tokens(1, 20)[0]
    logits = addition.first_layer_logits(model, text, PLACES)
    block, seen = model.block(0), []
    encoding = model.encoding()
    scores = type(encoding).scores

    class Spy(type(encoding)):
        def scores(self, q, k, ctx):
            seen.append(scores(self, q, k, ctx))
            return seen[-1]

    encoding.__class__ = Spy
    block.attention(encoding, block.attention_norm(model.embed(text[None])), PLACES[None])
    np.testing.assert_allclose(logits, seen[0][0], atol=1e-5)
