"""Copied text: the windows, the copy gain against its definition, and a model with a known range."""

import math

import numpy as np
import pytest

from posenc_jax.evaluation import copying
from posenc_jax.evaluation.scoring import ScoredModel
from posenc_jax.evaluation.window_sums import Key
from tests.evaluation.test_extrapolation import reference, setup

DOCUMENTS = ("a", "a", "b", "b", "c")
CHANGES = {"evaluation__copy_distances": (16, 48, 100), "evaluation__copy_chunk": 8}


def test_windows_show_the_same_text_but_for_the_first_chunk():
    windows = np.arange(3 * 20).reshape(3, 20)
    own, other = (copying.shown_twice(windows, 3, 7, first) for first in (None, np.roll(windows[:, 3:6], -1, axis=0)))
    assert own[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 3, 4, 5]
    assert other[0].tolist() == [0, 1, 2, 23, 24, 25, 6, 7, 8, 9, 3, 4, 5]
    assert other[2].tolist() == [40, 41, 42, 3, 4, 5, 46, 47, 48, 49, 43, 44, 45]


@pytest.mark.parametrize("scaling", ["none", "ntk"])
def test_the_copy_gain_equals_its_definition(scaling):
    config, scorer, params, constants, windows = setup("rope", evaluation__rope_scalings=("none", "ntk"), **CHANGES)
    token_bytes = np.arange(1, 257, dtype=np.int32)
    measured = copying.measure_copies(ScoredModel(config, scorer, params, constants), windows, token_bytes, DOCUMENTS)
    assert {key.length for key in measured} == {16, 48, 100}
    for distance in (16, 48, 100):
        sums = measured[Key(scaling, "copy_gain", distance)]
        assert sums.tokens.tolist() == [7] * 5
        np.testing.assert_array_equal(sums.bytes, windows[:, 9:16].sum(axis=1) + 7)
        if scaling == "none" or distance + 15 <= 64:
            own, other = (
                reference(scorer.graphdef, params, constants, copying.shown_twice(windows, 8, distance, first))
                for first in (None, windows[[2, 2, 4, 4, 0], 8:16])
            )
            np.testing.assert_allclose(sums.nats, (other - own)[:, -7:].sum(axis=1), rtol=1e-3, atol=1e-4)
    changed = measured[Key("ntk", "copy_gain", 100)].nats - measured[Key("none", "copy_gain", 100)].nats
    assert abs(changed).max() > 1e-4


def test_a_model_finds_nothing_past_its_window():
    """With a window of 16 tokens, two layers cannot reach 48 tokens back."""
    *arrays, windows = setup("rope", model__window=16, model__num_layers=2, **CHANGES)
    measured = copying.measure_copies(ScoredModel(*arrays), windows, np.ones(256, np.int32), DOCUMENTS)
    near, far = (measured[Key("none", "copy_gain", distance)].nats for distance in (16, 48))
    assert abs(near).max() > 1e-3
    np.testing.assert_allclose(far, 0, atol=1e-4)


def test_a_distance_past_the_table_has_no_value():
    *arrays, windows = setup("learned", **CHANGES)
    measured = copying.measure_copies(ScoredModel(*arrays), windows, np.ones(256, np.int32), DOCUMENTS)
    assert measured[Key("none", "copy_gain", 48)] is not None
    assert measured[Key("none", "copy_gain", 100)] is None
    assert math.isfinite(measured[Key("none", "copy_gain", 16)].nats.sum())


def test_the_other_text_is_of_another_document_where_there_is_one():
    def others(documents):
        return copying.of_another_document(documents).tolist()

    assert others("aabbc") == [2, 2, 4, 4, 0]
    assert others("aaaaab") == [5, 5, 5, 5, 5, 0]
    assert others("abca") == [1, 2, 3, 1]
    assert others("aaa") == [1, 2, 0]


def test_a_single_window_has_no_other_text_and_nothing_is_measured():
    *arrays, windows = setup("rope", **CHANGES)
    assert copying.measure_copies(ScoredModel(*arrays), windows[:1], np.ones(256, np.int32), ("a",)) == {}
