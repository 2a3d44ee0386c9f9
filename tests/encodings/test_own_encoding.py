"""A user-defined encoding works without a row in the table. For an invalid one, the error says what to change."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention import AttentionMask, attention
from posenc_jax.attention.blockwise import blockwise
from posenc_jax.attention.dense import dense
from posenc_jax.encodings.base import Constant, DistanceBias, Encoding, distances
from posenc_jax.schema import ConfigError, Positive
from tests.small import DIMS


class Fading(Encoding):
    @dataclass(frozen=True)
    class Config:
        rate: Positive = 1.0

    def __init__(self, config, dims, rngs):
        self.rate = Constant(jnp.full((dims.num_heads,), config.rate, jnp.float32))

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return -self.rate[:, None, None] * distances(q_pos, k_pos)[:, None]


def build(cls, **hyperparameters):
    return encodings.build(cls, DIMS, nnx.Rngs(0), **hyperparameters)


def queries(length=20):
    return jax.random.normal(jax.random.key(0), (2, length, 4, 8))


def test_a_class_is_built_without_a_row_in_the_table():
    q, own = queries(), build(Fading, rate=0.25)
    alibi = encodings.build("alibi", DIMS, nnx.Rngs(0))
    alibi.slopes[...] = own.rate[...]
    np.testing.assert_allclose(attention(own, q, q, q), attention(alibi, q, q, q), atol=1e-6)


def test_settings_of_a_class_are_checked_as_those_of_the_table():
    with pytest.raises(ConfigError, match=r"encoding 'Fading'.rate = -1.0: must be above 0"):
        build(Fading, rate=-1)
    with pytest.raises(ConfigError, match=r"encoding 'Fading'.rat = 2.0: no such field.*Did you mean 'rate'"):
        build(Fading, rat=2.0)


@pytest.mark.parametrize("name", ["fading", Fading.Config, 3])
def test_what_is_not_in_the_table_is_told_where_to_add_it(name):
    with pytest.raises(ConfigError, match="a class of your own needs a row in TABLE of posenc_jax/encodings"):
        build(name)


def test_an_encoding_without_a_hook_is_refused():
    class Nothing(Encoding):
        def prepare(self, x, positions):
            return x, x

    class Misspelt(Encoding):
        def biass(self, q, k, logits, q_pos, k_pos, ctx):
            return jnp.zeros((1, 1, 1, 1))

    with pytest.raises(TypeError, match=r"Nothing has no effect: it must override one of embed, rotate, .*, values$"):
        build(Nothing)
    with pytest.raises(TypeError, match=r"Misspelt has no effect.* Did you mean 'bias'"):
        build(Misspelt)


def test_a_bias_of_distance_without_its_function_is_refused():
    class Nothing(DistanceBias):
        pass

    with pytest.raises(NotImplementedError, match="Nothing must override distance_bias"):
        attention(build(Nothing), queries(), queries(), queries())


def class_with(config):
    """Define an encoding class with this Config. The error is raised when the class is defined."""
    return type("Own", (Encoding,), {"Config": config, "rotate": lambda self, q, k, *others: (q, k)})


def test_a_config_that_is_no_frozen_dataclass_is_refused():
    class Plain:
        rate: float = 1.0

    @dataclass
    class Thawed:
        rate: float = 1.0

    class Inherits(Fading.Config):
        other: float = 1.0

    for config in (Plain, Thawed, Inherits):
        with pytest.raises(TypeError, match=r"Own.Config must be a frozen dataclass: write @dataclass\(frozen=True\)"):
            class_with(config)


def test_a_setting_without_annotation_or_default_is_refused():
    @dataclass(frozen=True)
    class Unannotated:
        rate = 1.0

    @dataclass(frozen=True)
    class Required:
        rate: float

    with pytest.raises(TypeError, match=r"Own.Config.rate has no annotation, .*: write rate: float = 1.0"):
        class_with(Unannotated)
    with pytest.raises(TypeError, match=r"Own.Config.rate has no default"):
        class_with(Required)


def test_a_default_that_its_annotation_refuses_is_refused():
    @dataclass(frozen=True)
    class Zero:
        rate: Positive = 0.0

    @dataclass(frozen=True)
    class Words:
        rate: float = "fast"

    with pytest.raises(ConfigError, match=r"Own.Config.rate = 0.0: must be above 0"):
        class_with(Zero)
    with pytest.raises(ConfigError, match=r"Own.Config.rate = 'fast': must be a number, not a string"):
        class_with(Words)


def test_a_config_may_have_methods_and_properties():
    @dataclass(frozen=True)
    class Config:
        rate: float = 1.0

        @property
        def twice(self):
            return 2 * self.rate

        def times(self, n):
            return n * self.rate

    assert class_with(Config).Config().twice == 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (lambda: jnp.ones(4), "ArrayImpl"),
        (lambda: np.ones(4), "ndarray"),
        (lambda: nnx.BatchStat(jnp.ones(4)), "BatchStat"),
    ],
    ids=["jax", "numpy", "another variable"],
)
def test_arrays_that_training_would_lose_are_refused(value, kind):
    class Holds(Fading):
        def __init__(self, config, dims, rngs):
            super().__init__(config, dims, rngs)
            self.slopes = value()

    with pytest.raises(TypeError, match=rf"Holds.slopes is of type {kind}, .*: assign nnx.Param\(array\) if it is"):
        build(Holds)


WRONG = {
    "no batch": (lambda bias: bias[0], r"shape \(4, 20, 20\) and dtype float32"),
    "queries and keys alone": (lambda bias: bias[0, 0], r"shape \(20, 20\)"),
    "a number": (lambda bias: 0.0, r"shape \(\)"),
    "heads last": (lambda bias: jnp.moveaxis(bias, 1, 3), r"shape \(1, 20, 20, 4\)"),
    "two heads for four": (lambda bias: bias[:, :2], r"shape \(1, 2, 20, 20\)"),
    "dtype": (lambda bias: bias.astype("bfloat16"), r"dtype bfloat16"),
    "whole numbers": (lambda bias: bias.astype(int), r"dtype int32"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("attend", [dense, blockwise], ids=lambda attend: attend.__name__)
def test_a_bias_of_the_wrong_shape_or_dtype_is_refused(change, message, attend):
    class Wrong(Fading):
        def bias(self, *arguments):
            return change(super().bias(*arguments))

    must = r": must be float32 of shape \[2 or 1, 4 or 1, 20, 20\]"
    with pytest.raises(TypeError, match="Wrong.bias has .*" + message + ".*" * ("dtype" not in message) + must):
        attention(build(Wrong), queries(), queries(), queries(), attend=attend)


@pytest.mark.parametrize("attend", [dense, blockwise], ids=lambda attend: attend.__name__)
def test_a_bias_of_distance_of_the_wrong_shape_or_dtype_is_refused(attend):
    class Flat(DistanceBias):
        def distance_bias(self, distance):
            return -distance.astype("float32")

    class Whole(DistanceBias):
        def distance_bias(self, distance):
            return -jnp.multiply.outer(jnp.arange(4), distance)

    for cls, found in ((Flat, "has shape .* and dtype float32"), (Whole, "has shape .* and dtype int32")):
        with pytest.raises(TypeError, match=rf"{cls.__name__}.distance_bias {found}: must be float32 of shape \[H, "):
            attention(build(cls), queries(), queries(), queries(), None, AttentionMask(), attend=attend)
