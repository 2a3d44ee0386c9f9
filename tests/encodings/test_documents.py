"""Documents packed into one window have the logits of each alone, under every encoding."""

import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.encodings.base import overrides
from tests.attention.rows import abstract
from tests.encodings.test_contract import forms, small
from tests.small import DIMS, forward, tokens

SIZE = 15  # tokens of each of two documents
TEXT, DOCUMENTS = tokens(length=SIZE), jnp.arange(2, dtype=jnp.int32).repeat(SIZE)[None]


def packed(model, text):
    return forward(model, text.reshape(1, -1), documents=DOCUMENTS).reshape(*text.shape, -1)


def summing_forms():
    """Every encoding, and every form of those that compute something from the tokens before attention."""
    for form in forms():
        name, hyperparameters = form.values
        if not hyperparameters or overrides(abstract(name, dims=DIMS), "prepare", "extend"):
            yield form


@pytest.mark.parametrize(("name", "hyperparameters"), list(summing_forms()))
def test_each_document_has_the_logits_that_it_has_alone(name, hyperparameters):
    model = small(name, hyperparameters=hyperparameters)
    found, changed = packed(model, TEXT), packed(model, TEXT.at[0, 3].add(1))
    np.testing.assert_allclose(found, forward(model, TEXT), atol=2e-5)
    assert (found[1] == changed[1]).all()  # to the last bit
    assert jnp.abs(found[0] - changed[0]).max() > 1e-3
