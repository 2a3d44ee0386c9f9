"""RoPE's scaling rules against golden values, each other, and Hugging Face transformers."""

import math

import numpy as np
import pytest

from posenc_jax.encodings import frequencies
from posenc_jax.encodings.frequencies import parse
from posenc_jax.schema import ConfigError

sizes = pytest.mark.parametrize(("head_dim", "base", "length"), [(64, 1e4, 2048), (128, 5e5, 8192), (32, 1e4, 256)])
scaled = ["linear", "ntk", "by_parts", "yarn", "llama3"]


@pytest.mark.parametrize(
    ("head_dim", "factor", "base"),
    [(64, 2, 20452), (64, 4, 41829), (64, 8, 85550), (128, 2, 20221), (128, 4, 40890), (128, 8, 82685)],
)
def test_ntk_raises_the_base_as_published(head_dim, factor, base):
    theta, _ = frequencies.ntk(head_dim, 1e4, 2048, factor=factor)
    assert theta[1] == pytest.approx(base ** (-2 / head_dim), rel=1e-5)


@sizes
def test_ntk_keeps_the_fastest_pair_and_interpolates_the_slowest(head_dim, base, length):
    theta, _ = frequencies.none(head_dim, base, length)
    changed, _ = frequencies.ntk(head_dim, base, length, factor=4)
    assert changed[0] == theta[0] == 1
    assert changed[-1] == pytest.approx(theta[-1] / 4, rel=1e-12)


@sizes
def test_linear_divides_every_frequency(head_dim, base, length):
    theta, factor = frequencies.linear(head_dim, base, length, factor=8)
    np.testing.assert_allclose(theta * 8, frequencies.none(head_dim, base, length)[0])
    assert factor == 1


@sizes
@pytest.mark.parametrize("rule", scaled)
def test_factor_one_is_unscaled(head_dim, base, length, rule):
    theta, factor = frequencies.RULES[rule](head_dim, base, length, factor=1)
    np.testing.assert_allclose(theta, frequencies.none(head_dim, base, length)[0], rtol=1e-14)
    assert factor == 1


@pytest.mark.parametrize(
    ("head_dim", "length", "bounds"),
    [(64, 512, (3, 16)), (64, 2048, (8, 21)), (128, 2048, (16, 41)), (128, 4096, (20, 46))],
)
def test_yarn_mixes_between_the_published_indices(head_dim, length, bounds):
    assert frequencies.correction_range(head_dim, 1e4, length, 32, 1) == bounds
    low, high = bounds
    theta, plain = frequencies.yarn(head_dim, 1e4, length, factor=4)[0], frequencies.none(head_dim, 1e4, length)[0]
    np.testing.assert_allclose(theta[: low + 1], plain[: low + 1])
    np.testing.assert_allclose(theta[high:], plain[high:] / 4)
    assert (theta[low + 1 : high] < plain[low + 1 : high]).all()
    assert (theta[low + 1 : high] > plain[low + 1 : high] / 4).all()


@pytest.mark.parametrize(("factor", "expected"), [(2, 1.0693), (4, 1.1386), (8, 1.2079), (16, 1.2773), (32, 1.3466)])
def test_yarn_attention_factor_is_as_published(factor, expected):
    assert frequencies.yarn(64, 1e4, 2048, factor=factor)[1] == pytest.approx(expected, abs=5e-5)


# Covers cases in which no pair, one pair or all pairs are above beta_fast or below beta_slow, and those in between.
@pytest.mark.parametrize("base", [2.0, 100.0, 1e4])
@pytest.mark.parametrize("head_dim", [4, 32, 64])
@pytest.mark.parametrize("length", [8, 128, 4096, 10**6])
@pytest.mark.parametrize(
    ("beta_fast", "beta_slow"), [(32, 1), (1, 0.03125), (1e6, 1e5), (1e-6, 1e-7), (1e7, 1e-7), (21, 20)]
)
def test_by_parts_keeps_pairs_that_turn_often_and_interpolates_those_that_do_not(
    head_dim, base, length, beta_fast, beta_slow
):
    plain, _ = frequencies.none(head_dim, base, length)
    theta, _ = frequencies.by_parts(head_dim, base, length, factor=4, beta_fast=beta_fast, beta_slow=beta_slow)
    turns = length * plain / (2 * math.pi)
    kept = (4 * theta / plain - 1) / 3
    np.testing.assert_allclose(kept[turns >= beta_fast], 1, atol=1e-12)
    np.testing.assert_allclose(kept[turns <= beta_slow], 0, atol=1e-12)
    assert (np.diff(kept) <= 1e-12).all()
    assert ((kept > -1e-12) & (kept < 1 + 1e-12)).all()


@pytest.mark.parametrize(("head_dim", "length"), [(64, 128), (64, 2048), (32, 1024), (128, 4096)])
def test_the_range_is_cut_as_in_the_released_code_where_that_leaves_one(head_dim, length):
    for beta_fast, beta_slow in ((32, 1), (8, 0.001), (1000, 0.5)):
        low, high = (
            head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(1e4))
            for turns in (beta_fast, beta_slow)
        )
        expected = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
        assert frequencies.correction_range(head_dim, 1e4, length, beta_fast, beta_slow) == expected


@pytest.mark.parametrize(("head_dim", "base"), [(64, 1e4), (48, 500.0)])
def test_the_index_of_a_pair_that_turns_exactly_so_often_is_whole(head_dim, base):
    for m, rate in enumerate(frequencies.none(head_dim, base, 128)[0]):
        assert frequencies.pair_index(head_dim, base, 128, 128 * rate / (2 * math.pi)) == m


def test_paper_ramp_follows_definition_2():
    theta, _ = frequencies.by_parts(64, 1e4, 2048, factor=4, paper_ramp=True)
    plain, _ = frequencies.none(64, 1e4, 2048)
    for changed, own in zip(theta, plain, strict=True):
        ratio = 2048 * own / (2 * math.pi)
        gamma = min(max((ratio - 1) / (32 - 1), 0), 1)
        assert changed == pytest.approx((1 - gamma) * own / 4 + gamma * own)


def test_llama3_keeps_29_mixes_6_and_scales_29_pairs():
    theta, _ = frequencies.llama3(128, 5e5, 8192, factor=8)
    plain, _ = frequencies.none(128, 5e5, 8192)
    kept, whole = np.isclose(theta, plain), np.isclose(theta, plain / 8)
    assert (kept.sum(), (~kept & ~whole).sum(), whole.sum()) == (29, 6, 29)


@pytest.mark.parametrize("read", [1, 100, 256])
def test_dynamic_ntk_within_the_training_length_is_unscaled(read):
    theta, _ = frequencies.dynamic_ntk(64, 1e4, 256, factor=2, read=read)
    np.testing.assert_array_equal(theta, frequencies.none(64, 1e4, 256)[0])
    assert str(parse("dynamic_ntk").at(read, 256)) == "none"


def test_dynamic_ntk_with_factor_one_is_ntk_at_the_length_read():
    dynamic = frequencies.dynamic_ntk(64, 1e4, 256, factor=1, read=1024)[0]
    np.testing.assert_allclose(dynamic, frequencies.ntk(64, 1e4, 256, factor=4)[0])


def test_reading_long_then_short_equals_short_alone():
    scaling = parse("dynamic_ntk:factor=4")
    scaling.at(8192, 256).frequencies(64, 1e4, 256)
    short = scaling.at(300, 256).frequencies(64, 1e4, 256)
    np.testing.assert_array_equal(short[0], frequencies.dynamic_ntk(64, 1e4, 256, factor=4, read=300)[0])


@pytest.mark.parametrize("rule", scaled)
def test_a_factor_not_given_is_the_length_read_over_the_training_length(rule):
    assert parse(rule).at(1024, 256) == parse(f"{rule}:factor=4")
    assert str(parse(rule).at(256, 256)) == "none"
    assert parse(f"{rule}:factor=8").at(1024, 256) == parse(f"{rule}:factor=8")
    assert parse(f"{rule}:original_length=128").at(1024, 256).parameters[0] == ("factor", 8.0)


def test_a_scaling_survives_its_text():
    for text in ("none", "linear:factor=3", "yarn:beta_fast=2,beta_slow=0.0625", "longrope:factors=1|1.02|1.5"):
        assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("texts", "one"),
    [
        (("yarn:factor=4.0", "yarn:factor=4e0", "yarn:beta_slow=1,factor=4,beta_fast=32.0"), "yarn:factor=4"),
        (("rebased:to=500000.0", "rebased:to=5e5", "rebased:to=0.5e6"), "rebased:to=500000"),
        (("rebased", "rebased:to=1e6"), "rebased"),
        (("dynamic_ntk:factor=2", "dynamic_ntk:factor=2.0"), "dynamic_ntk"),
        (("longrope:factor=2.0,factors=1.0|2e0",), "longrope:factors=1|2,factor=2"),
        (("linear:original_length=64.0,factor=1",), "linear:factor=1,original_length=64"),
        (("by_parts:paper_ramp=0", "by_parts"), "by_parts"),
        (("by_parts:paper_ramp=1.0",), "by_parts:paper_ramp=1"),
    ],
)
def test_a_scaling_has_one_text_however_it_is_written(texts, one):
    for text in texts:
        assert str(parse(text)) == one
        assert parse(text) == parse(one)


@pytest.mark.parametrize("text", ["longrope:factors=1|1.5|2|7,factor=1", "longrope:factors=2|2|2|2,factor=1"])
@pytest.mark.parametrize("read", [100, 1024])
def test_factors_of_longrope_apply_also_with_factor_one(text, read):
    theta, factor = parse(text).at(read, 256).frequencies(8, 1e4, 256)
    factors = np.array(text.partition("=")[2].partition(",")[0].split("|"), float)
    np.testing.assert_allclose(theta, [1 / factors[0], 0.1 / factors[1], 0.01 / factors[2], 0.001 / factors[3]])
    assert factor == 1


@pytest.mark.parametrize("rule", scaled)
def test_a_factor_that_is_given_applies_at_every_length(rule):
    for factor in (1, 4):
        given = parse(f"{rule}:factor={factor}")
        assert [given.at(read, 256) for read in (100, 256, 1024)] == [given] * 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("yarm", "Did you mean 'yarn'"),
        ("none:factor=2", "none takes, each once: nothing"),
        ("yarn:beta=3", "did you mean 'beta_slow'"),
        ("yarn:factor=2,factor=3", "each once"),
        ("linear:factor=two", "factor must be a number"),
        ("linear:factor=0.5", "at least 1"),
        ("linear:factor=nan", "finite"),
        ("linear:factor=inf", "finite"),
        ("yarn:beta_fast=0.5", "beta_slow"),
        ("llama3:low_freq_factor=4", "low_freq_factor"),
        ("longrope", "needs factors"),
        ("longrope:factors=1|two", "factors must be numbers"),
        ("longrope:factors=1|0", "at least 0.001"),
        ("longrope:factors=1|2,short=1|-1", "at least 0.001"),
        ("longrope:short=1|2", "needs factors"),
        ("longrope:factors=1|2,short=", "short must be numbers"),
        ("yarn:attention_factor=-1", "at least 0"),
        ("yarn:truncate=2", "truncate must be 0 or 1"),
        ("proportional:fraction=1.5", "fraction must be a finite number between 0 and 1"),
        ("longrope:factors=1|2,factor=1|2", "factor must be a number"),
    ],
)
def test_a_wrong_scaling_is_refused(text, reason):
    with pytest.raises(ConfigError, match=reason):
        parse(text, "evaluation.rope_scalings[0]")


@pytest.mark.torch
@sizes
@pytest.mark.parametrize("factor", [1.0, 2.0, 5.5, 32.0])
@pytest.mark.parametrize(
    ("rule", "own"),
    [
        ("default", "none"),
        ("linear", "linear:factor={factor}"),
        ("dynamic", "dynamic_ntk:factor={factor},read={read}"),
        ("yarn", "yarn:factor={factor}"),
        ("yarn", "yarn:factor={factor},beta_fast=16,beta_slow=2"),
        ("llama3", "llama3:factor={factor},low_freq_factor=1,high_freq_factor=4"),
    ],
)
def test_rules_equal_hugging_face(head_dim, base, length, factor, rule, own):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    read = 3 * length
    own = own.format(factor=factor, read=read)
    parameters = {"rope_type": rule, "rope_theta": base, "factor": factor, "original_max_position_embeddings": length}
    written = dict(part.split("=") for part in own.partition(":")[2].split(",") if part)
    parameters |= {name: float(value) for name, value in written.items() if name not in ("factor", "read")}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        # The length after the extension, for rules that know the original length.
        max_position_embeddings=int(length * factor) if rule in ("yarn", "llama3") else length,
        rope_parameters=parameters,
    )
    if rule == "default":
        model = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        expected, attention_factor = model.inv_freq, model.attention_scaling
    else:
        expected, attention_factor = rope.ROPE_INIT_FUNCTIONS[rule](config, "cpu", seq_len=read)
    theta, ours = parse(own).frequencies(head_dim, base, length)
    np.testing.assert_allclose(theta, expected.numpy(), rtol=2e-5)
    assert ours == pytest.approx(attention_factor, rel=1e-6)


@pytest.mark.parametrize(("factor", "expected"), [(1, 1.0), (2, 1.0408), (4, 1.0801), (8, 1.1180), (32, 1.1902)])
def test_longrope_attention_factor_is_as_published(factor, expected):
    assert frequencies.longrope(4, 1e4, 4096, factors=(1.0, 2.0), factor=factor)[1] == pytest.approx(expected, abs=5e-5)


def test_longrope_divides_each_frequency_by_its_own_factor():
    theta, _ = parse("longrope:factors=1|1.5|2|7").frequencies(8, 1e4, 256)
    np.testing.assert_allclose(theta, [1, 0.1 / 1.5, 0.01 / 2, 0.001 / 7])


def test_longrope_reads_its_attention_factor_from_the_length():
    scaling = parse("longrope:factors=1|2")
    assert scaling.at(1024, 256) == parse("longrope:factor=4,factors=1|2")
    assert str(scaling.at(256, 256)) == "none"


@pytest.mark.parametrize(("pairs", "fits"), [(2, True), (3, False)])
def test_factors_are_one_number_per_pair(pairs, fits):
    scaling = parse("longrope:factors=1|2")
    if fits:
        scaling.check(2 * pairs, 1e4, 256, (), "scaling")
    else:
        with pytest.raises(ConfigError, match=r"^scaling = 'longrope:factors=1\|2': factors must be 3 numbers"):
            scaling.check(2 * pairs, 1e4, 256, (), "scaling")


@pytest.mark.torch
@sizes
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0])
def test_longrope_equals_hugging_face(head_dim, base, length, factor):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    factors = np.sort(np.random.default_rng(0).uniform(1, 8, head_dim // 2)).tolist()
    parameters = {"rope_type": "longrope", "rope_theta": base, "factor": factor}
    parameters |= {"long_factor": factors, "short_factor": [1.0] * len(factors)}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=int(length * factor),
        rope_parameters=parameters | {"original_max_position_embeddings": length},
    )
    expected, attention_factor = rope.ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length + 1)
    scaling = frequencies.Scaling("longrope", (("factors", tuple(factors)), ("factor", factor)))
    theta, ours = scaling.frequencies(head_dim, base, length)
    np.testing.assert_allclose(theta, expected.numpy(), rtol=2e-5)
    assert ours == pytest.approx(attention_factor, rel=1e-6)


@pytest.mark.parametrize(("head_dim", "to"), [(64, 1e6), (32, 500.0)])
def test_rebased_is_another_base_at_every_length(head_dim, to):
    rule = parse(f"rebased:to={to}")
    for read in (64, 1024):
        at_length = rule.at(read, 256)
        theta, factor = at_length.frequencies(head_dim, 1e4, 256)
        np.testing.assert_allclose(theta, to ** (-np.arange(0, head_dim, 2) / head_dim), rtol=1e-12)
        assert factor == 1


@pytest.mark.parametrize(("head_dim", "base"), [(64, 1e4), (32, 100.0)])
def test_resonance_rounds_wavelengths_to_whole_tokens(head_dim, base):
    """Wang et al. 2024, section 4: each pair repeats its angles after a whole number of tokens."""
    theta, factor = frequencies.resonance(head_dim, base, 512)
    plain, _ = frequencies.none(head_dim, base, 512)
    for own, unrounded in zip(theta, plain, strict=True):
        period = round(2 * np.pi / unrounded)
        assert own * period == pytest.approx(2 * np.pi, rel=1e-12)
    assert factor == 1
    yarn, resonant = (frequencies.yarn(head_dim, base, 512, factor=4, resonant=own) for own in (False, True))
    np.testing.assert_allclose(2 * np.pi / resonant[0], np.round(2 * np.pi / yarn[0]), rtol=1e-12)
    assert yarn[1] == resonant[1]
