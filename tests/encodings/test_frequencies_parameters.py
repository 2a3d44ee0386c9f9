"""Parameters of scaling rules that published models have, against formulas of their own."""

import math

import numpy as np
import pytest

from posenc_jax.encodings import frequencies
from posenc_jax.encodings.frequencies import parse


@pytest.mark.parametrize("text", ["yarn:factor=4", "longrope:factors=1|2|3|4,factor=4"])
def test_a_given_attention_factor_replaces_that_of_the_rule(text):
    theta, usual = parse(text).frequencies(8, 1e4, 256)
    given, factor = parse(f"{text},attention_factor=1.75").frequencies(8, 1e4, 256)
    np.testing.assert_array_equal(given, theta)
    assert factor == 1.75 != usual
    assert parse(f"{text},attention_factor=0") == parse(text)


def released_kept(head_dim, base, length, fast, slow, truncate):
    """How much of each pair's rate YaRN's released code keeps: one pair at a time, as its loops would."""
    low, high = (head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 * (low == high)
    return [1 - min(max((m - low) / (high - low), 0), 1) for m in range(head_dim // 2)]


@pytest.mark.parametrize("rule", ["yarn", "by_parts"])
@pytest.mark.parametrize("truncate", [0, 1])
@pytest.mark.parametrize(("base", "length"), [(1e4, 4096), (1e4, 256), (2.0, 10_000), (1e4, 5), (1e4, 8)])
def test_the_range_of_mixed_pairs_can_be_that_of_the_released_code(rule, base, length, truncate):
    scaling = parse(f"{rule}:factor=4,beta_fast=32,beta_slow=1.3,truncate={truncate},always_cut=1")
    plain, _ = frequencies.none(32, base, length)
    kept = np.array(released_kept(32, base, length, 32, 1.3, truncate))
    theta, _ = scaling.frequencies(32, base, length)
    np.testing.assert_allclose(theta, kept * plain + (1 - kept) * plain / 4, rtol=1e-8)


@pytest.mark.parametrize(("base", "length", "kept"), [(2.0, 10_000, 1), (1e4, 5, 0)])
def test_where_that_code_reverses_the_range_only_always_cut_does(base, length, kept):
    plain, _ = frequencies.none(32, base, length)
    usual, released = (
        parse(text).frequencies(32, base, length)[0] for text in ("by_parts:factor=4", "by_parts:factor=4,always_cut=1")
    )
    np.testing.assert_allclose(usual, plain if kept else plain / 4, rtol=1e-12)
    assert abs(released / usual - 1).max() > 0.1


def test_without_truncate_the_range_has_no_whole_ends():
    usual = frequencies.correction_range(64, 1e4, 2048, 32, 1)
    low, high = frequencies.correction_range(64, 1e4, 2048, 32, 1, truncate=False)
    assert usual == (math.floor(low), math.ceil(high)) != (low, high)
    assert 1e4 ** (-2 * low / 64) * 2048 == pytest.approx(32 * 2 * math.pi)
    assert 1e4 ** (-2 * high / 64) * 2048 == pytest.approx(2 * math.pi)


def test_short_factors_apply_within_the_length_and_the_others_past_it():
    scaling = parse("longrope:factors=2|4|8|16,short=1|1|1.5|2,factor=4")
    plain = np.array([1, 0.1, 0.01, 0.001])
    for read, factors in ((4, [1, 1, 1.5, 2]), (256, [1, 1, 1.5, 2]), (257, [2, 4, 8, 16])):
        theta, factor = scaling.at(read, 256).frequencies(8, 1e4, 256)
        np.testing.assert_allclose(theta, plain / factors)
        assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(256)))
    assert str(scaling.at(512, 256)) == "longrope:factors=2|4|8|16,factor=4"
    assert scaling.at(512, 1024) == scaling


def test_with_short_factors_the_factor_still_follows_the_length():
    scaling = parse("longrope:factors=2|4|8|16,short=1|1|1.5|2")
    assert scaling.at(256, 256) == scaling
    assert str(scaling.at(1024, 256)) == "longrope:factors=2|4|8|16,factor=4"


@pytest.mark.parametrize(("fraction", "turning"), [(0, 0), (0.3, 4), (0.5, 8), (1, 16)])
def test_proportional_turns_only_the_fastest_pairs(fraction, turning):
    theta, factor = parse(f"proportional:fraction={fraction},factor=8").frequencies(32, 1e4, 256)
    expected = [1e4 ** (-m / 16) / 8 if m < turning else 0 for m in range(16)]
    np.testing.assert_allclose(theta, expected, rtol=1e-12)
    assert factor == 1


@pytest.mark.parametrize(
    ("text", "within", "past"),
    [
        ("none", "none", "none"),
        ("dynamic_ntk:factor=3", "dynamic_ntk:factor=3", "dynamic_ntk:factor=3,read=1024"),
        ("dynamic_ntk:factor=3,read=512", "dynamic_ntk:factor=3,read=512", "dynamic_ntk:factor=3,read=512"),
        (
            "longrope:factors=2|4,short=1|2,factor=4",
            "longrope:factors=2|4,short=1|2,factor=4",
            "longrope:factors=2|4,factor=4",
        ),
        ("longrope:factors=2|4", "longrope:factors=2|4", "longrope:factors=2|4"),
        ("yarn", "yarn", "yarn"),
        ("yarn:factor=4", "yarn:factor=4", "yarn:factor=4"),
        ("ntk", "ntk", "ntk"),
    ],
)
def test_only_two_rules_of_a_model_follow_the_length(text, within, past):
    scaling = parse(text)
    assert [str(scaling.own_at(read, 256)) for read in (100, 256, 1024)] == [within, within, past]
    assert scaling.own_follows_length == (within != past)


def test_the_original_length_decides_where_a_rule_of_a_model_follows():
    scaling = parse("dynamic_ntk:factor=3,original_length=128")
    assert scaling.own_at(128, 256) == scaling
    assert str(scaling.own_at(200, 256)) == "dynamic_ntk:factor=3,read=200,original_length=128"
