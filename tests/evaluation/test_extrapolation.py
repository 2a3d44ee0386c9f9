"""The evaluation protocol against its definition, computed one window and one token at a time."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx

from configs import bert
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.run_results import result_rows
from posenc_jax.evaluation.scoring import ScoredModel, Scorer
from posenc_jax.training import objectives
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import abstract_model, initial_state
from tests.small import run_config

LENGTHS = (32, 64, 128, 256)


SMALL = {"model__num_layers": 1, "evaluation__lengths": LENGTHS, "evaluation__windows": 5, "evaluation__tail": 16}


def setup(encoding="rope", devices=1, **changes):
    return with_model(run_config(encoding, **SMALL | changes), devices)


@functools.cache
def scorer_of(graphdef, devices):
    """All models with the same structure share compiled programs."""
    return Scorer(graphdef, sharding.make_mesh(devices, jax.devices()[:devices]), batch_tokens=512)


def counting(arguments):
    """The same arguments with a scorer that has compiled nothing."""
    config, scorer, *others = arguments
    return config, scorer_of.__wrapped__(scorer.graphdef, 1), *others


def with_model(config, devices=1):
    optimizer = optimizers.build(config.optimizer, total_steps=1, warmup_steps=0)
    state = initial_state(config, optimizer)
    # Larger weights than at initialization, so that positions matter.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, state["params"])
    scorer = scorer_of(abstract_model(config)[0], devices)
    windows = np.random.default_rng(0).integers(0, 256, (5, LENGTHS[-1] + 1), dtype=np.int32)
    return config, scorer, params, state["constants"], windows


def measure(config, scorer, params, constants, windows, token_bytes):
    return extrapolation.measure_lengths(ScoredModel(config, scorer, params, constants), windows, token_bytes)


@functools.partial(jax.jit, static_argnums=0)
def _reference(graphdef, params, constants, *arguments):
    return token_losses(nnx.merge(graphdef, params, constants), *arguments)


def reference(graphdef, params, constants, tokens, hidden=None):
    """The loss of each token, for all windows in one batch."""
    return np.asarray(_reference(graphdef, params, constants, tokens, None, hidden), np.float64)


def evaluate(*arguments, token_bytes=None):
    token_bytes = np.ones(256, np.int32) if token_bytes is None else token_bytes
    documents = [f"document {i}" for i in range(len(arguments[4]))]
    results = result_rows(arguments[0], measure(*arguments, token_bytes), documents)
    return {(row.scaling, row.metric, row.eval_length): row for row in results}


def test_every_metric_equals_its_definition():
    config, scorer, params, constants, windows = setup(evaluation__rope_scalings=("none",))
    rows = evaluate(config, scorer, params, constants, windows)
    nats = reference(scorer.graphdef, params, constants, windows)
    for length in LENGTHS:
        prefix, tail = nats[:, :length].mean(), nats[:, length - 16 : length].mean()
        assert rows["none", "prefix_bits_per_byte", length].value == pytest.approx(prefix / math.log(2), rel=1e-5)
        assert rows["none", "prefix_perplexity", length].value == pytest.approx(math.exp(prefix), rel=1e-4)
        assert rows["none", "tail_bits_per_byte", length].value == pytest.approx(tail / math.log(2), rel=1e-5)
        assert rows["none", "prefix_bits_per_byte", length].tokens == 5 * length
        if length <= 64:
            assert ("none", "context_gain_bits_per_byte", length) not in rows
            continue
        short = reference(scorer.graphdef, params, constants, windows[:, length - 64 : length + 1])[:, -16:].mean()
        gain = rows["none", "context_gain_bits_per_byte", length].value
        assert gain == pytest.approx((short - tail) / math.log(2), abs=1e-5)
        assert abs(gain) > 1e-4
    curve = {stop: row for (_, metric, stop), row in rows.items() if metric == "by_position_bits_per_byte"}
    assert sorted(curve) == list(range(4, 257, 4))
    assert curve[40].value == pytest.approx(nats[:, 36:40].mean() / math.log(2), rel=1e-5)


def test_an_encoder_is_scored_on_the_same_hidden_tokens_in_windows_of_every_length():
    recipe = bert.get_config("size=smoke,tokens=bytes,positions=rope")
    recipe.model.num_layers = 1
    recipe.evaluation.lengths, recipe.evaluation.windows, recipe.evaluation.tail = LENGTHS, 5, 16
    config, scorer, params, constants, windows = counting(with_model(RunConfig.from_mapping(recipe.to_dict())))
    rows = evaluate(config, scorer, params, constants, windows)
    hidden = objectives.evaluation_choice(config, windows)

    def bits(start, stop, tail=None):
        chosen = hidden[:, start:stop]
        nats = reference(scorer.graphdef, params, constants, windows[:, start : stop + 1], chosen)
        kept = slice(None) if tail is None else slice(-tail, None)
        return nats[:, kept].sum() / chosen[:, kept].sum() / math.log(2), chosen[:, kept].sum()

    for length in LENGTHS:
        for metric, (value, count) in (("prefix", bits(0, length)), ("tail", bits(0, length, 16))):
            row = rows["none", f"{metric}_bits_per_byte", length]
            assert (row.value, row.tokens) == (pytest.approx(value, rel=1e-4), count)
        if length > 64:
            gain = bits(length - 64, length, 16)[0] - bits(0, length, 16)[0]
            assert rows["none", "context_gain_bits_per_byte", length].value == pytest.approx(gain, abs=1e-4)
    assert scorer.compilations == len(LENGTHS)


LONGROPE = "longrope:factors=" + "|".join(f"{1 + m / 5:g}" for m in range(16))


@pytest.mark.parametrize("scaling", ["linear", "ntk", "dynamic_ntk", "yarn", "linear:factor=4", LONGROPE])
def test_a_scaling_rule_is_what_a_model_built_with_it_computes(scaling):
    config, scorer, params, constants, windows = setup(evaluation__rope_scalings=("none", scaling))
    rows = evaluate(config, scorer, params, constants, windows)
    for length in LENGTHS:
        rule = str(frequencies.parse(scaling).at(length, 64))
        built = dataclasses.replace(
            config,
            encoding=dataclasses.replace(
                config.encoding, hyperparameters=dataclasses.replace(config.encoding.hyperparameters, scaling=rule)
            ),
        )
        own = initial_state(built, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))["constants"]
        nats = reference(abstract_model(built)[0], params, own, windows[:, : length + 1])
        expected = nats.mean() / math.log(2)
        assert rows[scaling, "prefix_bits_per_byte", length].value == pytest.approx(expected, rel=1e-5)
        difference = rows[scaling, "prefix_change_bits_per_byte", length].value
        unscaled = rows["none", "prefix_bits_per_byte", length].value
        assert difference == pytest.approx(expected - unscaled, abs=1e-5)
    assert abs(rows[scaling, "prefix_change_bits_per_byte", 256].value) > 1e-4


def test_one_compilation_serves_every_length_where_no_rule_depends_on_it():
    config, scorer, params, constants, windows = counting(setup(evaluation__rope_scalings=("none", "linear:factor=4")))
    evaluate(config, scorer, params, constants, windows)
    assert scorer.compilations == 2  # the longest length, and the training length, the reference for context gains


def test_rules_that_depend_on_the_length_compile_once_per_length_together():
    scalings = ("none", "linear", "ntk", "dynamic_ntk", "by_parts", "yarn", "llama3")
    config, scorer, params, constants, windows = counting(setup(evaluation__rope_scalings=scalings))
    evaluate(config, scorer, params, constants, windows)
    assert scorer.compilations == 3  # 64, 128, 256


@pytest.mark.parametrize("rule", ["yarn:factor=4", "llama3:factor=8"])
@pytest.mark.parametrize("positions", ["contiguous", "randomized"])
def test_a_rule_is_read_with_the_frequencies_that_it_is_trained_with(rule, positions):
    schedule = {"positions__training": positions, "positions__range": 1024}
    trained = run_config("rope", encoding__scaling=rule, evaluation__rope_scalings=("none",), **schedule)
    plain = run_config("rope", evaluation__rope_scalings=("none", rule), **schedule)
    optimizer = optimizers.build(plain.optimizer, total_steps=1, warmup_steps=0)
    expected, constants = (initial_state(config, optimizer)["constants"] for config in (trained, plain))
    found = extrapolation.scaled_constants(plain, constants, rule)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_within_the_positions_of_training_no_rule_scales():
    config, scorer, params, constants, windows = setup(
        evaluation__rope_scalings=("none", "ntk"), positions__training="randomized", positions__range=256
    )
    rows = evaluate(config, scorer, params, constants, windows)
    assert rows["ntk", "prefix_change_bits_per_byte", 256].value == 0


def test_a_continued_run_gains_from_context_past_that_of_its_first_training():
    config, scorer, params, constants, windows = setup(
        training__length=128, training__pretrained_length=64, evaluation__rope_scalings=("none",)
    )
    rows = evaluate(config, scorer, params, constants, windows)
    long, short = (
        reference(scorer.graphdef, params, constants, windows[:, start:129])[:, -16:].mean() for start in (0, 64)
    )
    gain = rows["none", "context_gain_bits_per_byte", 128]
    assert gain.value == pytest.approx((short - long) / math.log(2), abs=1e-5)
    assert gain.train_length == 64


def test_a_long_pass_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(extrapolation, "LOGGED_SECONDS", -1)
    with caplog.at_level("INFO"):
        evaluate(*setup(evaluation__rope_scalings=("none",), evaluation__lengths=(256,)))
    told = [record.getMessage().rpartition(" in ")[0] for record in caplog.records if "scored" in record.getMessage()]
    assert told == [f"scored 5 windows of {length} tokens with the scaling rule none" for length in (256, 64)]


def test_lengths_within_the_training_length_are_unscaled():
    config, scorer, params, constants, windows = setup(evaluation__rope_scalings=("none", "ntk"))
    rows = evaluate(config, scorer, params, constants, windows)
    for length in (32, 64):
        assert rows["ntk", "prefix_bits_per_byte", length].value == rows["none", "prefix_bits_per_byte", length].value


def test_lengths_past_a_table_have_no_value():
    rows = evaluate(*setup("learned"))
    assert rows["none", "prefix_bits_per_byte", 64].value is not None
    for length in (128, 256):
        for metric in ("prefix", "tail", "context_gain"):
            assert rows["none", f"{metric}_bits_per_byte", length].value is None
    assert max(length for _, metric, length in rows if metric == "by_position_bits_per_byte") == 64


@pytest.mark.parametrize(("longest", "width", "last"), [(130, 3, 1), (67, 2, 1)])
def test_the_curve_by_position_holds_every_token_also_in_a_last_narrower_bin(longest, width, last):
    arguments = setup(evaluation__lengths=(32, longest), evaluation__rope_scalings=("none",))
    _, scorer, params, constants, windows = arguments
    measured = measure(*arguments, np.ones(256, np.int32))
    curve = {key.length: sums for key, sums in measured.items() if key.metric == "by_position"}
    assert list(curve) == [*range(width, longest, width), longest]
    nats = reference(scorer.graphdef, params, constants, windows[:, : longest + 1])
    np.testing.assert_allclose(curve[longest].nats, nats[:, longest - last :].sum(axis=1), rtol=1e-4)
    assert sum(sums.tokens.sum() for sums in curve.values()) == 5 * longest


def test_bits_are_per_byte_whatever_the_bytes_of_a_token():
    arguments = setup(evaluation__rope_scalings=("none",))
    sizes = np.random.default_rng(1).integers(1, 9, 256).astype(np.int32)
    one, many = evaluate(*arguments), evaluate(*arguments, token_bytes=sizes)
    key, targets = ("none", "prefix_bits_per_byte", 64), arguments[-1][:, 1:65]
    assert many[key].value == pytest.approx(one[key].value * targets.size / sizes[targets].sum())
    key = ("none", "prefix_perplexity", 64)
    assert many[key].value == one[key].value


@pytest.mark.parametrize("devices", [2, 8])
def test_devices_share_the_windows_and_give_the_same_numbers(devices):
    one, several = evaluate(*setup()), evaluate(*setup(devices=devices))
    for key, row in one.items():
        assert several[key].value == pytest.approx(row.value, rel=1e-4, abs=1e-4)


def test_scoring_does_not_depend_on_how_windows_are_batched():
    _config, scorer, params, constants, windows = setup()
    small = Scorer(scorer.graphdef, sharding.make_mesh(1, jax.devices()[:1]), batch_tokens=1)
    np.testing.assert_allclose(small(params, constants, windows), scorer(params, constants, windows), atol=1e-4)
