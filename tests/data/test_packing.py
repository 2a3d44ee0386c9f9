"""Packed windows: every token is read once an epoch, and each has the number of its document."""

import itertools

import numpy as np
import pytest

from posenc_jax.data import pipeline
from posenc_jax.schema import ConfigError
from tests.data.test_pipeline import numbered

SPLIT = numbered(5, 1, 30, 0, 3, 2, 9, 6)  # 56 tokens: 7 windows of 8
OPTIONS = {"length": 8, "batch_size": 7, "seed": 0, "packed": True}


def batches(count, split=SPLIT, **options):
    return list(itertools.islice(pipeline.training_batches(split, **OPTIONS | options), count))


def test_an_epoch_reads_every_token_once_in_an_order_of_its_own():
    assert pipeline.epoch_tokens(SPLIT, 8, packed=True) == 56
    first, second = (batch[:, 0, :-1].flatten() for batch in batches(2))
    assert sorted(first) == sorted(second) == list(range(56))
    assert not np.array_equal(first, second)


def test_windows_number_their_documents_and_follow_them():
    for window, documents in np.concatenate(batches(20)):
        assert documents[0] == 0
        of_split = np.searchsorted(SPLIT.offsets, window, side="right")
        steps, changes = np.diff(documents), np.diff(of_split) != 0
        same = ~changes & (np.diff(window) == 1)  # an epoch may begin with the document that the last one ended with
        assert np.array_equal(steps, 1 - same)
        begins = np.isin(window[1:], SPLIT.offsets)
        assert begins[steps == 1].all()  # a document that begins in a window begins with its first token


def test_epochs_that_no_number_of_windows_fills_go_on_in_the_next_one():
    windows = np.concatenate(batches(5, numbered(10, 20, 31)))  # 61 tokens, 35 windows
    read = windows[:, 0, :-1].flatten()
    counts = np.bincount(read, minlength=61)
    assert counts.sum() == 280
    assert set(counts) <= {4, 5}  # 280 tokens are 4.6 epochs


@pytest.mark.parametrize("step", [0, 3])
def test_a_batch_depends_on_the_seed_and_the_step_alone(step):
    whole, other = batches(5), batches(5, seed=1)
    assert np.array_equal(batches(1, start_step=step)[0], whole[step])
    assert np.array_equal(batches(1, start_step=step, rows=np.array([1, 4]))[0], whole[step][[1, 4]])
    assert not np.array_equal(whole[step], other[step])


def test_a_split_that_does_not_fill_a_window_is_refused():
    for use in (lambda: batches(1, length=56), lambda: pipeline.epoch_tokens(SPLIT, 56, packed=True)):
        with pytest.raises(
            ConfigError, match=r"config.training.length = 56: must be below 56, the tokens of the train"
        ):
            use()
