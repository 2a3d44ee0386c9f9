"""Layer patterns, attention windows, and dropped encodings."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.encodings.base import Dims
from posenc_jax.models.transformer import Transformer
from posenc_jax.schema import ConfigError
from posenc_jax.training.step import abstract_model
from tests.encodings.test_contract import one_of_each_kind
from tests.small import forward, run_config, split, tokens, transformer


def with_arrays_of(model, other):
    """The structure of `model` with the arrays of `other`."""
    _, params, constants = split(other)
    return nnx.merge(split(model)[0], params, constants)


def test_layers_without_the_encoding_see_no_positions():
    """ALiBi with such steep slopes that, in layers with the encoding, a token attends only to itself."""
    text = tokens()
    changed = text.at[:, 5].set((text[:, 5] + 1) % 64)
    steep = {"hyperparameters": {"max_exponent": 1e-6}, "num_layers": 1}

    def reached(**changes):
        model = transformer("alibi", **steep | changes)
        for encoding in [model.encoding()]:
            encoding.slopes[...] = jnp.full_like(encoding.slopes[...], 1e4)
        return jnp.abs(model(text) - model(changed)).max(axis=(0, 2)) > 1e-6

    assert reached().tolist() == [i == 5 for i in range(32)]
    assert reached(num_layers=2, pattern="EN").tolist() == [i >= 5 for i in range(32)]


@pytest.mark.parametrize("name", ["t5", "fire", "rope"])
def test_positions_from_0_on_are_those_of_a_text_without_any_given(name):
    model, text = transformer(name, num_layers=1, window=100), tokens(length=160)
    own, given = forward(model, text), forward(model, text, jnp.arange(160)[None])
    doubled = forward(model, text, 2 * jnp.arange(160)[None])
    np.testing.assert_allclose(own, given, atol=1e-5)
    assert jnp.abs(own - doubled).max() > 1e-3


@pytest.mark.parametrize("name", ["fox", "rope"])
def test_a_pattern_repeats_over_the_layers_and_holds_no_unused_encoding(name):
    model = transformer(name, num_layers=5, pattern="EEN")
    assert [module == "without" for module in model.modules] == [False, False, True, False, False]
    own = [key for key in split(model)[1] | split(model)[2] if key.startswith("encoding_")]
    assert sorted(own) == (["encoding_0"] if encodings.load(name).shared else [f"encoding_{i}" for i in (0, 1, 3, 4)])
    assert jnp.abs(model(tokens()) - transformer(name, num_layers=5)(tokens())).max() > 1e-3


@pytest.mark.parametrize("length", [32, 200], ids=["dense", "blockwise"])
def test_a_window_hides_earlier_keys_in_layers_with_the_encoding_alone(length):
    text = tokens(length=length)
    changed = text.at[:, 5].set((text[:, 5] + 1) % 64)

    def reached(**changes):
        model = transformer("rope", num_layers=1, window=8, **changes)
        return (jnp.abs(forward(model, text) - forward(model, changed)).max(axis=(0, 2)) > 1e-7).tolist()

    assert reached() == [5 <= i < 5 + 8 for i in range(length)]
    two_layers = transformer("rope", num_layers=2, pattern="EN", window=8)
    last = jnp.abs(forward(two_layers, text) - forward(two_layers, changed))[:, -1].max()
    assert last > 1e-7


@one_of_each_kind
def test_a_dropped_encoding_leaves_the_model_without_one(name):
    config = run_config(name)
    graphdef, _ = abstract_model(config, dropped=True)
    encoded = transformer(name)
    _, params, constants = split(encoded)
    dropped = nnx.merge(split(encoded)[0], params, constants)
    dropped.drop_encodings()
    without = transformer("none")
    own = {key: value for key, value in params.items() if not key.startswith("encoding_")}
    without = nnx.merge(split(without)[0], own, split(without)[2])
    np.testing.assert_array_equal(forward(dropped, tokens()), forward(without, tokens()))
    assert graphdef != abstract_model(config)[0]


@pytest.mark.parametrize("pattern", ["", "EXN", "e", "NNNE"])
def test_a_wrong_pattern_is_refused(pattern):
    with pytest.raises(ConfigError, match=r"config.model.pattern = .*must "):
        run_config(model__pattern=pattern)


def test_a_model_is_built_by_hand_from_defaults():
    rope = EncodingConfig.of("rope", base=500_000.0)
    assert rope.hyperparameters.base == 500_000.0
    model = Transformer(TransformerConfig(), rope, vocab_size=64, max_length=32, rngs=nnx.Rngs(0))
    by_settings = transformer(
        "rope", hyperparameters={"base": 500_000.0}, dims=Dims(128, 2, 2, 64, 32), num_layers=4, d_ff=384
    )
    np.testing.assert_array_equal(forward(model, tokens()), forward(by_settings, tokens()))
