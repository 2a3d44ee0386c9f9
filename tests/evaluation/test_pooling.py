"""Numbers over seeds, differences of the same seeds and windows, and the order that they allow."""

import math

import numpy as np
import pytest

from posenc_jax.evaluation.measured import Key, Sums
from posenc_jax.evaluation.pooling import Pool

W = 64
TOKENS = np.full(W, 128.0)


def measured(mean, seed, *, unreadable=False):
    """A loss of `mean` bits per byte, with an effect of the window that all variants share and a little noise."""
    rng = np.random.default_rng(seed)
    bits = mean + np.random.default_rng(99).normal(0, 0.5, W) + rng.normal(0, 0.01, W)
    sums = Sums(bits * math.log(2) * TOKENS, TOKENS, TOKENS)
    return {Key("none", "prefix", 128): sums, Key("none", "prefix", 512): None if unreadable else sums}


def pool(**variants):
    return Pool("study", variants, train_length=128, resamples=500)


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
