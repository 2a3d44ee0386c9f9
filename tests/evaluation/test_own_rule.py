"""A model's own scaling rule that follows the length read: evaluation, the short context of gains, copies, training."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from posenc_jax.encodings import frequencies
from posenc_jax.evaluation import copying, extrapolation
from posenc_jax.evaluation.scoring import ScoredModel
from posenc_jax.evaluation.window_sums import Key
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import initial_state
from tests.evaluation.test_copying import CHANGES, DOCUMENTS
from tests.evaluation.test_extrapolation import LENGTHS, evaluate, reference, setup
from tests.small import run_config

LONG, SHORT = ("|".join(f"{1 + m / by:g}" for m in range(16)) for by in (4, 20))
DYNAMIC, LONGROPE = "dynamic_ntk:factor=3", f"longrope:factors={LONG},short={SHORT},factor=4"
WITHIN = {DYNAMIC: "none", LONGROPE: f"longrope:factors={SHORT},factor=4"}
PAST = {DYNAMIC: "dynamic_ntk:factor=3,read={}", LONGROPE: f"longrope:factors={LONG},factor=4"}
own_rules = pytest.mark.parametrize("own", [DYNAMIC, LONGROPE], ids=["dynamic_ntk", "longrope"])


def constants_with(config, scaling):
    """The constants of a model that is built with a rule as its own."""
    hyperparameters = dataclasses.replace(config.encoding.hyperparameters, scaling=scaling)
    built = dataclasses.replace(config, encoding=dataclasses.replace(config.encoding, hyperparameters=hyperparameters))
    return initial_state(built, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))["constants"]


def nats_of(arguments, scaling, tokens):
    config, scorer, params, *_ = arguments
    return reference(scorer.graphdef, params, constants_with(config, scaling), tokens)


@own_rules
def test_each_length_is_read_with_the_rule_of_that_length(own):
    arguments = setup(encoding__scaling=own, evaluation__rope_scalings=("none", "linear", "linear:factor=2"))
    windows, rows = arguments[-1], evaluate(*arguments)
    for length in LENGTHS:
        rule = WITHIN[own] if length <= 64 else PAST[own].format(length)
        nats = nats_of(arguments, rule, windows[:, : length + 1])
        bits = rows["none", "prefix_bits_per_byte", length].value
        assert bits == pytest.approx(nats.mean() / math.log(2), rel=1e-5)
        replaced = nats_of(arguments, "linear:factor=2", windows[:, : length + 1]).mean() / math.log(2)
        assert rows["linear:factor=2", "prefix_bits_per_byte", length].value == pytest.approx(replaced, rel=1e-5)
        if length <= 64:  # there the rule changes nothing
            assert rows["linear", "prefix_bits_per_byte", length].value == bits
            continue
        short = nats_of(arguments, WITHIN[own], windows[:, length - 64 : length + 1])[:, -16:].mean()
        gain = (short - nats[:, -16:].mean()) / math.log(2)
        assert rows["none", "context_gain_bits_per_byte", length].value == pytest.approx(gain, abs=1e-5)
        elsewhere = nats_of(arguments, WITHIN[own], windows[:, : length + 1])
        assert abs(elsewhere.mean() - nats.mean()) > 1e-4


@own_rules
def test_copies_are_measured_with_the_rule_of_the_whole_window(own):
    arguments = setup(encoding__scaling=own, evaluation__rope_scalings=("none",), **CHANGES)
    measured = copying.measure_copies(ScoredModel(*arguments[:4]), arguments[4], np.ones(256, np.int32), DOCUMENTS)
    for distance in (16, 100):
        length = distance + 15
        rule = WITHIN[own] if length <= 64 else PAST[own].format(length)
        own_text, other = (
            nats_of(arguments, rule, copying.shown_twice(arguments[4], 8, distance, first))
            for first in (None, arguments[4][[2, 2, 4, 4, 0], 8:16])
        )
        expected = (other - own_text)[:, -7:].sum(axis=1)
        np.testing.assert_allclose(measured[Key("none", "copy_gain", distance)].nats, expected, rtol=1e-3, atol=1e-4)


@own_rules
def test_the_spectrum_is_that_of_the_longest_length(own):
    config, _, _, constants, _ = setup(encoding__scaling=own, evaluation__rope_scalings=("none", "linear"))
    found = extrapolation.spectra(config, constants)["none"]
    expected, _ = frequencies.parse(PAST[own].format(256)).frequencies(32, 10000.0, 64)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@own_rules
@pytest.mark.parametrize("length", [64, 128])
def test_training_windows_have_the_rule_of_their_length(own, length):
    config = run_config("rope", encoding__scaling=own, training__length=length, training__pretrained_length=64)
    found = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))["constants"]
    rule = WITHIN[own] if length == 64 else PAST[own].format(length)
    jax.tree.map(np.testing.assert_array_equal, found, constants_with(config, rule))
    at_64 = extrapolation.scaled_constants(config, found, extrapolation.rule_at(config, "none", 64))
    jax.tree.map(np.testing.assert_array_equal, at_64, constants_with(config, WITHIN[own]))


@pytest.mark.parametrize(
    "own", ["none", "yarn:factor=4", "linear", "dynamic_ntk:factor=2,read=128", "longrope:factors=" + LONG]
)
def test_another_rule_of_the_model_keeps_the_constants_of_training(own):
    config = run_config("rope", encoding__scaling=own, evaluation__rope_scalings=("none", "ntk"))
    assert [extrapolation.rule_at(config, "none", length) for length in LENGTHS] == ["none"] * 4
    assert [extrapolation.rule_at(config, "ntk", length) for length in (64, 128)] == ["none", "ntk:factor=2"]


def test_layers_with_their_own_base_are_never_scaled():
    changes = {"model__pattern": "EG", "model__window": 16, "model__num_layers": 2, "encoding__window_base": 100.0}
    config, _, _, constants, _ = setup(encoding__scaling=DYNAMIC, **changes)
    own = constants["window_encoding"]["inverse_frequencies"]
    np.testing.assert_allclose(own, 100.0 ** (-np.arange(16) / 16), rtol=1e-6)
    for rule in ("linear:factor=4", extrapolation.rule_at(config, "none", 256)):
        found = extrapolation.scaled_constants(config, constants, rule)
        jax.tree.map(np.testing.assert_array_equal, found["window_encoding"], constants["window_encoding"])
        expected, _ = frequencies.parse(rule).frequencies(32, 10000.0, 64)
        np.testing.assert_allclose(found["encoding_0"]["inverse_frequencies"], expected, rtol=1e-6)
        assert found.keys() == constants.keys()
