"""Whether models know the order of tokens: encoders without positions, recurrent models, and causal masks."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from experiments.recurrence import order
from posenc_jax.config import RunConfig
from posenc_jax.models.recurrent import ELMo, Recurrent
from tests.small import transformer

TEXT = b" I love you"
TOKENS = jnp.asarray(list(TEXT), jnp.int32) % 64
ENCODER = {"causal": False, "num_layers": 3}


def of_cell(cell):
    config = RunConfig.from_mapping(recurrent.get_config(f"size=smoke,cell={cell}").to_dict())
    return (ELMo if cell == "elmo" else Recurrent)(config.model, vocab_size=64, rngs=nnx.Rngs(0))


def test_orders_are_all_permutations_of_whole_words():
    orders = order.word_orders(TEXT)
    assert len(orders) == math.factorial(3)
    texts = {bytes(np.frombuffer(TEXT, np.uint8)[row]) for row in orders}
    assert len(texts) == 6
    assert bytes(np.frombuffer(TEXT, np.uint8)[orders[0]]) == TEXT
    assert b" you love I" in texts
    with pytest.raises(ValueError, match="8 words"):
        order.word_orders(b"a b c d e f g h")


def test_an_encoder_without_positions_is_blind_to_order():
    change = order.reordering_change(transformer("none", **ENCODER), TOKENS, order.word_orders(TEXT)[1:])
    assert change.max() < 1e-5


@pytest.mark.parametrize("encoding", ["learned", "sinusoidal", "rope"])
def test_an_encoder_with_positions_is_not(encoding):
    change = order.reordering_change(transformer(encoding, **ENCODER), TOKENS, order.word_orders(TEXT))
    assert change[0] < 1e-5  # the original order
    assert change[1:].min() > 0.01


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru", "elmo"])
def test_recurrent_models_are_not(cell):
    assert order.reordering_change(of_cell(cell), TOKENS, order.word_orders(TEXT)[1:]).min() > 0.01


def test_the_change_of_a_representation_is_relative_to_its_size():
    class Doubled(type(transformer("rope"))):
        def states(self, x, positions=None, **options):
            return 2 * super().states(x, positions, **options)

    model = transformer("rope", **ENCODER)
    orders = order.word_orders(TEXT)[1:]
    plain = order.reordering_change(model, TOKENS, orders)
    model.__class__ = Doubled
    np.testing.assert_allclose(order.reordering_change(model, TOKENS, orders), plain, rtol=1e-4)


def test_one_causal_layer_without_positions_knows_what_came_before_and_two_in_which_order():
    earlier = order.word_orders(TEXT[: TEXT.rindex(b" ")])[1:]
    changes = [
        order.last_state_change(transformer("none", num_layers=layers), TOKENS, earlier).max() for layers in (1, 2)
    ]
    assert changes[0] < 1e-5
    assert changes[1] > 1e-4
    # One layer also notices a different earlier token.
    other = order.representations(transformer("none", num_layers=1), TOKENS.at[2].add(1)[None])[0, -1]
    assert jnp.abs(other - order.representations(transformer("none", num_layers=1), TOKENS[None])[0, -1]).max() > 1e-4
