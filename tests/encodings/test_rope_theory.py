"""Bounds on RoPE's base against published values."""

import math

import numpy as np
import pytest

from posenc_jax.encodings.rope_theory import (
    attended_distance,
    critical_dimension,
    extrapolation_bound,
    similarity,
    small_bases,
    smallest_base,
)


@pytest.mark.parametrize(
    ("head_dim", "length", "expected"),
    [
        *[(128, 4096, 92), (64, 256, 26), (64, 512, 32), (64, 1024, 36), (64, 2048, 42)],
        *[(32, 256, 14), (32, 512, 16), (32, 1024, 18), (32, 2048, 22), (64, 10**6, 64)],
    ],
)
def test_critical_dimension_is_as_published(head_dim, length, expected):
    assert critical_dimension(head_dim, 1e4, length) == expected


@pytest.mark.parametrize(("head_dim", "base", "length"), [(64, 1e4, 256), (128, 500.0, 1024)])
def test_pairs_below_the_critical_dimension_turn_in_training(head_dim, base, length):
    turns = length * base ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    assert critical_dimension(head_dim, base, length) == 2 * (turns > 1).sum()


@pytest.mark.parametrize(("head_dim", "base", "length"), [(64, 1e4, 4), (128, 500.0, 6)])
def test_no_channel_is_critical_where_no_pair_turns_once(head_dim, base, length):
    assert length / (2 * math.pi) < 1
    assert critical_dimension(head_dim, base, length) == 0


@pytest.mark.parametrize("power", [2, 4])
def test_the_critical_dimension_is_exact_where_a_pair_turns_just_once(power):
    for length in range(16, 4097, 16):
        assert critical_dimension(64, (length / (2 * math.pi)) ** power, length) == 64 // power


@pytest.mark.parametrize(
    ("tuned_base", "expected"),
    [(1e4, 4712), (2e4, 7754), (4e4, 12762), (8e4, 21003), (1.6e5, 34565), (6e5, 89377), (1e6, 129027)],
)
def test_extrapolation_bound_is_as_published(tuned_base, expected):
    assert extrapolation_bound(128, 1e4, 4096, tuned_base) == pytest.approx(expected, rel=1e-3)


def test_a_base_that_is_too_small_for_the_tuned_length_reads_that_length():
    assert extrapolation_bound(128, 1e4, 4096, 71_000, 16_384) == 16_384
    assert extrapolation_bound(128, 1e4, 4096, 72_000, 16_384) > 16_384


def test_small_bases_are_as_published():
    assert [round(base) for base in small_bases(4096)] == [2608, 1304, 652]


@pytest.mark.parametrize(
    ("length", "published"),
    [(1024, 4.3e3), (2048, 1.6e4), (4096, 2.7e4), pytest.param(8192, 8.4e4, marks=pytest.mark.slow)],
)
def test_smallest_base_is_the_published_one(length, published):
    assert 0.727 < smallest_base(128, length) / published < 1.07


def test_the_published_base_for_4096_tokens_fails_before_them():
    negative = np.flatnonzero(similarity(128, 2.7e4, np.arange(4097)) < 0)
    assert negative[0] == 4079


@pytest.mark.parametrize(("head_dim", "expected"), [(32, 2.1e5), (64, 3.0e4), (128, 1.2e4), (256, 8.0e3)])
def test_smallest_base_falls_as_heads_get_wider(head_dim, expected):
    assert smallest_base(head_dim, 2048) == pytest.approx(expected, rel=0.1)


def test_smallest_base_is_no_threshold():
    larger = 2.27e4  # violates the bound, though 1.2e4 does not
    assert similarity(128, larger, np.arange(2049)).min() < 0 < larger - smallest_base(128, 2048)


def test_no_base_serves_where_none_is_large_enough():
    assert smallest_base(4, 100_000, bases=(100.0, 500.0)) is None


def test_the_attended_distance_is_the_last_before_the_first_negative_similarity():
    distances = np.arange(3001)
    for head_dim, base in ((64, 1e4), (128, 4210.0), (32, 1e2)):
        b = similarity(head_dim, base, distances)
        found = attended_distance(head_dim, base, 3000)
        assert (b[: found + 1] >= 0).all()
        assert found == 3000 or b[found + 1] < 0
    assert attended_distance(128, 1e8, 500) == 500
