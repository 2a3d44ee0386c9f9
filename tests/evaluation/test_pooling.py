"""Results pooled over seeds, paired differences over seeds and windows, and the resulting ranks."""

import math
from itertools import pairwise

import numpy as np
import pytest

from posenc_jax.evaluation.pooling import Pool
from posenc_jax.evaluation.window_sums import Key, Sums

W = 64
DOCUMENTS = [f"document {i // 2}" for i in range(W)]
TOKENS = np.full(W, 128.0)


def measured(mean, seed, *, unreadable=False):
    """A loss of `mean` bits per byte, with a window effect that all variants share, and some noise."""
    rng = np.random.default_rng(seed)
    bits = mean + np.random.default_rng(99).normal(0, 0.5, W) + rng.normal(0, 0.01, W)
    sums = Sums(bits * math.log(2) * TOKENS, TOKENS, TOKENS)
    return {Key("none", "prefix", 128): sums, Key("none", "prefix", 512): None if unreadable else sums}


def pool(**variants):
    return Pool("study", variants, DOCUMENTS, train_length=128, resamples=500)


def row(rows, variant, metric, length=128):
    (found,) = (
        r for r in rows if (r.encoding, r.metric, r.eval_length) == (variant, f"{metric}_bits_per_byte", length)
    )
    return found


def test_a_difference_is_far_narrower_than_the_losses_it_is_of():
    seeds = range(3)
    own = pool(none={s: measured(2.0, s) for s in seeds}, rope={s: measured(1.9, 10 + s) for s in seeds})
    rows = own.results("none")
    loss, apart = row(rows, "rope", "prefix"), row(rows, "rope", "difference")
    assert (apart.seed, apart.tokens) == (None, 3 * W * 128)
    assert apart.value == pytest.approx(-0.1, abs=0.005)
    assert apart.ci_high - apart.ci_low < 0.02 < 0.1 < loss.ci_high - loss.ci_low
    assert not [r for r in rows if r.encoding == "none" and r.metric.startswith("difference")]


def test_ranks_tell_what_is_level_with_the_best():
    variants = {
        name: {s: measured(mean, i * 10 + s) for s in range(3)}
        for i, (name, mean) in enumerate({"c": 2.0, "a": 1.5, "b": 1.5005}.items())
    }
    own = pool(**variants)
    ranks = [rank for rank in own.ranks(own.results("")) if rank.eval_length == 128]
    assert {rank.curve for rank in ranks[:2]} == {"a", "b"}
    assert ranks[0].behind == 0
    assert ranks[1].ci_low <= 0 <= ranks[1].ci_high
    assert (ranks[2].curve, ranks[2].ci_low > 0.4) == ("c", True)


def test_a_difference_is_over_the_seeds_that_both_have():
    own = pool(none={0: measured(2.0, 0), 1: measured(7.0, 1)}, rope={1: measured(6.5, 2), 2: measured(1.0, 3)})
    assert row(own.results("none"), "rope", "difference").value == pytest.approx(-0.5, abs=0.01)


def test_a_length_that_cannot_be_read_has_no_value_and_no_rank():
    own = pool(none={0: measured(2.0, 0)}, learned={0: measured(1.9, 1, unreadable=True)})
    rows = own.results("none")
    assert row(rows, "learned", "prefix", 512).value is None
    assert row(rows, "learned", "difference", 512).value is None
    assert [rank.curve for rank in own.ranks(rows) if rank.eval_length == 512] == ["none"]


def test_a_variant_without_a_run_that_ended_well_is_left_out():
    own = pool(none={0: measured(2.0, 0)}, hot={})
    assert {r.encoding for r in own.results("none")} == {"none"}


def test_intervals_are_of_documents():
    """Identical windows of a document give no more information than one of them."""
    alike = np.random.default_rng(0).normal(2, 0.5, W // 4)
    sums = Sums(np.repeat(alike, 4) * math.log(2) * TOKENS, TOKENS, TOKENS)
    widths = []
    for size in (1, 4):
        documents = [f"document {i // size}" for i in range(W)]
        own = Pool("study", {"none": {0: {Key("none", "prefix", 128): sums}}}, documents, 128, resamples=500)
        widths.append(row(own.results(""), "none", "prefix").ci_high - row(own.results(""), "none", "prefix").ci_low)
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.15)


def test_from_one_document_there_are_numbers_and_an_order_but_no_intervals():
    variants = {"a": {0: measured(2.0, 0)}, "b": {0: measured(1.5, 1)}}
    own = Pool("study", variants, ["a.txt"] * W, train_length=128, resamples=500)
    rows = own.results("a")
    assert {(found.ci_low, found.ci_high) for found in rows} == {(None, None)}
    ranks = [rank for rank in own.ranks(rows) if rank.eval_length == 128]
    assert [(rank.curve, rank.ci_low) for rank in ranks] == [("b", 0.0), ("a", None)]


def test_orders_are_of_intervals_that_hold_for_all_pairs_at_once():
    """With eight variants, the plain interval of a difference is narrower than the one used for ranks."""
    own = pool(**{f"{i}": {s: measured(2 + i / 1000, 10 * i + s) for s in range(3)} for i in range(8)})
    ranks = [rank for rank in own.ranks(own.results("0")) if rank.eval_length == 128]
    assert [a.value <= b.value for a, b in pairwise(ranks)] == [True] * 7
    plain = row(own.results(ranks[0].curve), ranks[-1].curve, "difference")
    assert ranks[-1].behind == pytest.approx(plain.value)
    assert ranks[-1].ci_high - ranks[-1].ci_low > 1.3 * (plain.ci_high - plain.ci_low)
