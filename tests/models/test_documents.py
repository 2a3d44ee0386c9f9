"""Documents packed into one window have the outputs of each alone, in every kind of model."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.encodings.test_contract import perturbed
from tests.models.test_encoder import BERT
from tests.models.test_layers import SSMAX
from tests.models.test_recurrent import model as recurrent
from tests.small import forward, tokens, transformer

TEXT = tokens(3, 7)  # three documents of seven tokens
DOCUMENTS = jnp.arange(3, dtype=jnp.int32).repeat(7)[None]
SETTINGS = {"canon": True, "attention_gate": True, "attention_sinks": True, "num_kv_heads": 2, "window": 5}
MODELS = {
    "settings that read other tokens": lambda: transformer(
        "fox", pattern="LE", layers={"L": {"temperature": SSMAX}}, remat=True, **SETTINGS
    ),
    "encoder": lambda: transformer("alibi", **BERT),
    "encoder with absolute positions": lambda: transformer("learned", **BERT),
    "rnn": lambda: recurrent("rnn"),
    "lstm": lambda: recurrent("lstm", remat=True),
}


def assert_same(packed, alone):
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
def test_each_document_has_the_logits_that_it_has_alone(name):
    model = perturbed(MODELS[name]())
    packed = forward(model, TEXT.reshape(1, -1), documents=DOCUMENTS)
    assert_same(packed, forward(model, TEXT))
    changed = forward(model, TEXT.at[1, 3].add(1).reshape(1, -1), documents=DOCUMENTS)
    change = jnp.abs(packed - changed).max(axis=-1)[0]
    assert change[7:14].max() > 1e-3
    assert jnp.delete(change, jnp.arange(7, 14)).max() == 0


def test_both_directions_of_elmo_stay_within_documents():
    model = perturbed(recurrent("elmo"))
    assert_same(forward(model, TEXT.reshape(1, -1), documents=DOCUMENTS), forward(model, TEXT))
    packed = model.backward_states(model.embed(TEXT.reshape(1, -1)), documents=DOCUMENTS)
    assert_same(packed, model.backward_states(model.embed(TEXT)))
